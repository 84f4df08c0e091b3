"""Planted fault: the images, not the patients, are dealt to training and control. Membership tests would then be blind."""

from __future__ import annotations

import numpy as np
import pytest

from dpsynth.data.cohort import ImageSet
from dpsynth.data.split import Split, split_patients, split_problems
from dpsynth.errors import SelfCheckFailed


def cohort(patients: int = 60, images_each: int = 3) -> ImageSet:
    numbers = np.repeat(np.arange(patients, dtype=np.int64), images_each)
    return ImageSet(
        images=np.random.default_rng(0).uniform(-1, 1, (len(numbers), 1, 4, 4)).astype(np.float32),
        labels=numbers % 2,
        patients=numbers,
        patient_ids=tuple(f"P{number}" for number in range(patients)),
        classes=("a", "b"),
        attributes=({},) * len(numbers),
    )


def rows(images: ImageSet, chosen: np.ndarray) -> ImageSet:
    """The chosen images with their patients: what a split by image would hand over."""
    present, numbers = np.unique(images.patients[chosen], return_inverse=True)
    return ImageSet(
        images=images.images[chosen],
        labels=images.labels[chosen],
        patients=numbers.astype(np.int64),
        patient_ids=tuple(images.patient_ids[patient] for patient in present),
        classes=images.classes,
        attributes=tuple(images.attributes[row] for row in np.flatnonzero(chosen)),
    )


def test_a_split_by_image_is_refused_by_name() -> None:
    images = cohort()
    to_control = np.random.default_rng(1).random(len(images.images)) < 0.2
    with pytest.raises(SelfCheckFailed, match="image-level split"):
        Split(training=rows(images, ~to_control), control=rows(images, to_control), key=bytes(32), control_fraction=0.2)


def test_one_shared_patient_is_enough() -> None:
    images = cohort()
    to_control = images.patients < 12
    to_control[36] = True  # one image of patient 12, whose others are trained on
    with pytest.raises(SelfCheckFailed, match="1 patient"):
        Split(training=rows(images, ~to_control), control=rows(images, to_control), key=bytes(32), control_fraction=0.2)


def test_a_split_by_patient_has_no_problem() -> None:
    assert split_problems(split_patients(cohort(), control_fraction=0.3, key=bytes(32))) == ()
