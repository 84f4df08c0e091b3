"""From what the files say of an image to the declared values of its attributes, and to its cell. Torch-free."""

from __future__ import annotations

import hashlib
import hmac
import itertools
from collections.abc import Mapping
from dataclasses import replace

from dpsynth.cells import UNKNOWN
from dpsynth.config import AttributeConfig, DataConfig
from dpsynth.data.cohort import Cohort, ImageSet, Record
from dpsynth.errors import DataError


def columns(config: DataConfig) -> tuple[str, ...]:
    """Columns or keywords that hold the declared attributes."""
    return tuple(attribute.column or name for name, attribute in config.attributes.items())


def with_declared_values(cohort: Cohort, config: DataConfig) -> Cohort:
    """The cohort whose records map each declared attribute to one of its public values. Raises DataError for the first that has none."""
    if not config.attributes:
        return cohort
    require_columns(cohort, config)
    return replace(cohort, records=tuple(with_values(record, config) for record in cohort.records))


def with_values(record: Record, config: DataConfig) -> Record:
    """The record with a public value of each declared attribute. Raises DataError when it has none."""
    return replace(record, attributes={**record.attributes, **_declared(record.name, record.attributes, config)})


def value_problem(record: Record, config: DataConfig) -> str:
    """Which declared attribute an image has no public value of, and what can be done; empty when it has one of each."""
    try:
        with_values(record, config)
    except DataError as error:
        return str(error)
    return ""


def require_columns(cohort: Cohort, config: DataConfig) -> None:
    """Raise DataError when no image has a value in the column of a declared attribute."""
    present = {key for record in cohort.records for key in record.attributes}
    for name, column in zip(config.attributes, columns(config), strict=True):
        if column not in present:
            found = ", ".join(sorted(present)) or "none"
            raise DataError(f"data.attributes.{name}: no image has a value of {column!r}; there are: {found}. Correct the column.")


def _declared(image: str, stored: Mapping[str, str], config: DataConfig) -> dict[str, str]:
    return {name: _value(image, name, stored.get(attribute.column or name, ""), attribute) for name, attribute in config.attributes.items()}


def _value(image: str, name: str, stored: str, attribute: AttributeConfig) -> str:
    """The public value for a stored one: listed as it is, or the band that it lies in."""
    if not stored:
        if UNKNOWN in attribute.values:
            return UNKNOWN
        raise DataError(f"{image}: no value for {name}. Fill it in, leave the image out, or add {UNKNOWN} to data.attributes.{name}.")
    if stored in attribute.values:
        return stored
    band = _band(stored, attribute.bands)
    if band is None:
        expected = ", ".join(attribute.names)
        raise DataError(f"{image}: {name} {stored!r} is not in data.attributes.{name}: {expected}. Correct the file or the list.")
    return attribute.names[band]


def _band(stored: str, edges: tuple[float, ...]) -> int | None:
    try:
        number = float(stored)
    except ValueError:
        return None
    if edges and number == edges[-1]:
        return len(edges) - 2
    return next((band for band, (low, high) in enumerate(itertools.pairwise(edges)) if low <= number < high), None)


def by_cell(images: ImageSet, config: DataConfig) -> ImageSet:
    """The same images with their cells in place of their labels, for what is trained on cells."""
    if not config.attributes:
        return images
    cells = config.cells
    names = tuple(cells.name(cell) for cell in range(len(cells)))
    return replace(images, labels=cells.index(images.labels, images.attributes), classes=names)


def conditions_digest(images: ImageSet, config: DataConfig, *, salt: bytes) -> str:
    """Salted digest of the cell of every image, empty without attributes.

    The data set's fingerprint covers labels but no attributes, which each run chooses for itself; a run that goes on after a crash must
    find those with which it began, or its noise would be used for two different sums.
    """
    if not config.attributes:
        return ""
    content = "\0".join(f"{images.patient_ids[patient]}:{cell}" for patient, cell in zip(images.patients, images.labels, strict=True))
    return hmac.new(salt, content.encode(), hashlib.sha256).hexdigest()
