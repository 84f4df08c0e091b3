"""What an image and a cohort must be before anything is computed on them. Each fault is one DataError that names the image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from dpsynth.config import DataConfig
from dpsynth.data.cohort import Cohort, Image, Record
from dpsynth.errors import DataError

SMALLEST_COHORT = 20
_MOST_NAMED = 6
LARGEST_ASPECT = 50  # of the sides in millimetres; a centre crop of anything longer would show next to nothing


def decoded(record: Record, *, dimensions: int, channels: int) -> Image:
    """Decode and check one image: (channels, *space) with `dimensions` axes, finite, not constant. Raises DataError."""
    image = record.read()
    voxels = image.voxels
    if voxels.ndim != dimensions + 1:
        raise DataError(
            f"{record.name}: expected {dimensions} spatial dimensions as in data.spatial_shape, found {voxels.ndim - 1}. "
            "Images of one data set share them."
        )
    if voxels.shape[0] != channels:
        raise DataError(f"{record.name}: expected {channels} channels as in data.channels, found {voxels.shape[0]}.")
    if min(voxels.shape) < 1:
        raise DataError(f"{record.name}: the image is empty.")
    sizes = [side * step for side, step in zip(voxels.shape[1:], image.spacing_mm or (1.0,) * dimensions, strict=True)]
    if max(sizes) > LARGEST_ASPECT * min(sizes):
        raise DataError(f"{record.name}: one side is more than {LARGEST_ASPECT} times another. Crop it or correct its spacing.")
    if not np.isfinite(voxels).all():
        raise DataError(f"{record.name}: the image holds NaN or infinite values. Repair it or leave it out of the data set.")
    if voxels.min() == voxels.max():
        raise DataError(f"{record.name}: the image is constant. Leave it out of the data set.")
    return image


def require_usable(cohort: Cohort) -> None:
    """Raise DataError unless the cohort has enough patients, at least two in every class, and only known labels."""
    if cohort.num_patients < SMALLEST_COHORT:
        raise DataError(
            f"Expected at least {SMALLEST_COHORT} patients in {cohort.name!r}, found {cohort.num_patients}: "
            "too few for any useful guarantee. Add patients."
        )
    patients: dict[int, set[str]] = defaultdict(set)
    for record in cohort.records:
        patients[record.label].add(record.patient_id)
    for label, name in enumerate(cohort.classes):
        if len(patients[label]) < 2:
            raise DataError(
                f"Class {name!r} has {len(patients[label])} patients, expected at least 2. "
                "Merge it with another class or remove it from data.classes."
            )


def with_others(classes: tuple[str, ...], labels: Iterable[str]) -> tuple[str, ...]:
    """The public list and behind it, in order, the labels that are not on it: the empty one too, of images without a label."""
    return (*classes, *sorted({label.strip() for label in labels} - set(classes)))


def label_problem(record: Record, stored: tuple[str, ...], config: DataConfig) -> str:
    """What is wrong with the label of a record, whose number is one of `stored`; empty when it is on the public list."""
    if record.label < len(config.classes):
        return ""
    label = stored[record.label]
    found = f"label {label!r} is not in data.classes {list(config.classes)}" if label else f"label is empty in {config.label_column!r}"
    return f"{record.name}: {found}. Correct the label, or the list, or leave the image out by data.exclusions."


def require_some_label(cohort: Cohort, config: DataConfig) -> None:
    """Raise DataError when no image at all has a label of the public list: then list or column is wrong, not the images."""
    if all(record.label >= len(config.classes) for record in cohort.records):
        found = ", ".join(repr(label) for label in cohort.classes[len(config.classes) :][:_MOST_NAMED])
        raise DataError(
            f"No image has a label of data.classes {list(config.classes)}; there are: {found}. "
            f"Correct data.classes{'' if config.format == 'medmnist' else f' or data.label_column, which is {config.label_column!r}'}."
        )


def require_known_labels(cohort: Cohort, config: DataConfig) -> Cohort:
    """The cohort with the public list as its classes. Raises DataError for the first label that is not on it."""
    require_some_label(cohort, config)
    if wrong := next(filter(None, (label_problem(record, cohort.classes, config) for record in cohort.records)), ""):
        raise DataError(wrong)
    return replace(cohort, classes=config.classes)


def label_index(label: str, classes: tuple[str, ...], *, where: str) -> int:
    """Index of a label in the public list. Raises DataError."""
    try:
        return classes.index(label.strip())
    except ValueError as error:
        raise DataError(f"{where}: label {label!r} is not in data.classes {list(classes)}. Correct the table or the list.") from error
