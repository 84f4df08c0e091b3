"""Procedural patients: pictures like chests, brains or organs from a seed alone, for demonstrations, tests and public pre-training.

They look like coarse X-rays, MR slices and crops around an organ, and describe nobody. A patient is fixed by (seed, patient number),
whatever the size of the cohort; their images share the anatomy and differ a little in pose, exposure and noise. Torch-free.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from dpsynth.config import AnatomyName
from dpsynth.data.cohort import Cohort, Float32, Image, Int64, Record
from dpsynth.data.phantom_anatomy import Anatomy, Pose, draw_anatomy, draw_pose, render
from dpsynth.errors import DataError
from dpsynth.privacy.unit import PrivacyUnit

SITES = ("A", "B")
_COHORT, _PUBLIC = 0, 1  # separate streams: a public phantom never equals a cohort phantom of the same seed
_PERSON, _ANATOMY, _IMAGE = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class _Person:
    number: int
    label: int
    images: int
    sex: str
    age_years: int
    site: int


def phantom_cohort(
    *,
    anatomy: AnatomyName,
    num_patients: int,
    max_images: int,
    spatial_shape: tuple[int, ...],
    channels: int,
    classes: tuple[str, ...],
    seed: int,
    name: str,
) -> Cohort:
    """A cohort of procedural patients with 1 to `max_images` images each, drawn when read.

    Class 0 is normal, class k shows findings of kind k. Voxels are whole numbers 0..255, (channels, *spatial_shape);
    attributes are sex (F, M), age_years and site (A, B; the sites differ in contrast). Raises DataError.
    """
    _check(anatomies=(anatomy,), spatial_shape=spatial_shape, channels=channels)
    records = []
    for number in range(num_patients):
        person = _person(seed=seed, stream=_COHORT, number=number, num_classes=len(classes), max_images=max_images)
        attributes = {"sex": person.sex, "age_years": str(person.age_years), "site": SITES[person.site]}
        for index in range(person.images):
            draw = functools.partial(
                _image, anatomy=anatomy, person=person, index=index, spatial_shape=spatial_shape, channels=channels, seed=seed
            )
            records.append(
                Record(
                    patient_id=f"P{number:06d}",
                    name=f"P{number:06d}/{index}",
                    label=person.label,
                    attributes=attributes,
                    read=draw,
                )
            )
    return Cohort(name=name, unit=PrivacyUnit.PATIENT, classes=classes, records=tuple(records))


def phantom_images(
    *,
    anatomies: tuple[AnatomyName, ...] = ("chest", "brain"),
    num_images: int,
    spatial_shape: tuple[int, ...],
    channels: int,
    num_classes: int,
    seed: int,
) -> tuple[Float32, Int64, Int64]:
    """Public images for pre-training, far more varied than a cohort in geometry, contrast and texture.

    Returns images (num_images, channels, *spatial_shape) float32 in [-1, 1], labels and patients (num_images,).
    Raises DataError.
    """
    _check(anatomies=anatomies, spatial_shape=spatial_shape, channels=channels)
    images = np.empty((num_images, channels, *spatial_shape), dtype=np.float32)
    labels, patients = np.empty(num_images, dtype=np.int64), np.empty(num_images, dtype=np.int64)
    row = number = 0
    while row < num_images:
        person = _person(seed=seed, stream=_PUBLIC, number=number, num_classes=num_classes, max_images=2)
        anatomy = anatomies[number % len(anatomies)]
        for index in range(min(person.images, num_images - row)):
            images[row] = _pixels(
                anatomy=anatomy,
                person=person,
                index=index,
                spatial_shape=spatial_shape,
                channels=channels,
                seed=seed,
                stream=_PUBLIC,
            )
            labels[row], patients[row] = person.label, number
            row += 1
        number += 1
    return np.asarray(images / 127.5 - 1, dtype=np.float32), labels, patients


def _check(*, anatomies: tuple[str, ...], spatial_shape: tuple[int, ...], channels: int) -> None:
    known = get_args(AnatomyName)
    if not anatomies or any(name not in known for name in anatomies):
        raise DataError(f"Expected phantoms of {' or '.join(known)}, found {anatomies}. Change data.phantom.anatomy.")
    if len(spatial_shape) not in (2, 3) or channels not in (1, 3):
        raise DataError(f"Expected 2 or 3 sides and 1 or 3 channels, found {spatial_shape} and {channels}.")


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _person(*, seed: int, stream: int, number: int, num_classes: int, max_images: int) -> _Person:
    rng = _generator(seed, stream, number, _PERSON)
    return _Person(
        number=number,
        label=int(rng.integers(num_classes)),
        images=int(rng.integers(1, max_images + 1)),
        sex="FM"[int(rng.integers(2))],
        age_years=int(np.clip(rng.normal(58, 16), 18, 95)),
        site=int(rng.random() < 0.4),
    )


def _image(*, anatomy: AnatomyName, person: _Person, index: int, spatial_shape: tuple[int, ...], channels: int, seed: int) -> Image:
    voxels = _pixels(anatomy=anatomy, person=person, index=index, spatial_shape=spatial_shape, channels=channels, seed=seed, stream=_COHORT)
    return Image(voxels=voxels)


def _pixels(
    *,
    anatomy: AnatomyName,
    person: _Person,
    index: int,
    spatial_shape: tuple[int, ...],
    channels: int,
    seed: int,
    stream: int,
) -> Float32:
    variety = 1.0 if stream == _COHORT else 2.2
    rng = _generator(seed, stream, person.number, _ANATOMY)
    body = draw_anatomy(
        rng,
        anatomy=anatomy,
        label=person.label,
        male=person.sex == "M",
        age=(person.age_years - 58) / 40,
        site=person.site,
        variety=variety,
    )
    rng = _generator(seed, stream, person.number, _IMAGE, index)
    pose = draw_pose(rng, variety=variety)
    return _stored(rng, render(rng, body, pose, spatial_shape), body, pose, channels)


def _stored(rng: np.random.Generator, picture: NDArray[np.float64], body: Anatomy, pose: Pose, channels: int) -> Float32:
    """Exposure, noise, channels, and rounding to the 256 grey levels of an 8-bit file."""
    shown = np.clip(pose.exposure + pose.contrast * body.contrast * (picture - 0.5) + 0.5, 0, 1) ** body.gamma
    # One tint for the whole patient, as of a stain: grey levels keep their order in each channel.
    colour = shown[None] if channels == 1 else np.stack([shown**power for power in body.tint])
    noisy = colour + pose.noise * rng.standard_normal(colour.shape)
    return np.asarray(np.rint(np.clip(noisy, 0, 1) * 255), dtype=np.float32)
