"""The built-in cohort: the same from a seed everywhere, patients that are patients, findings that can be learned."""

from __future__ import annotations

import time
from typing import get_args

import numpy as np
import pytest

from dpsynth.config import AnatomyName
from dpsynth.data.cohort import Cohort
from dpsynth.data.phantom import phantom_cohort, phantom_images
from dpsynth.errors import DataError


def cohort(
    *,
    anatomy: AnatomyName = "chest",
    num_patients: int = 60,
    spatial_shape: tuple[int, ...] = (28, 28),
    channels: int = 1,
    classes: tuple[str, ...] = ("normal", "lesion"),
    seed: int = 1,
) -> Cohort:
    return phantom_cohort(
        anatomy=anatomy,
        num_patients=num_patients,
        max_images=3,
        spatial_shape=spatial_shape,
        channels=channels,
        classes=classes,
        seed=seed,
        name="phantom",
    )


def stacked(source: Cohort) -> np.ndarray:
    return np.stack([record.read().voxels for record in source.records])


@pytest.mark.parametrize("anatomy", get_args(AnatomyName))
@pytest.mark.parametrize(("shape", "channels"), [((28, 28), 1), ((20, 32), 3), ((12, 16, 8), 1)])
def test_images_have_the_shape_and_range_of_stored_8_bit_images(anatomy: AnatomyName, shape: tuple[int, ...], channels: int) -> None:
    images = stacked(cohort(anatomy=anatomy, num_patients=6, spatial_shape=shape, channels=channels))
    assert images.shape[1:] == (channels, *shape)
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() <= 255
    assert np.array_equal(images, np.rint(images))
    assert images.std(axis=tuple(range(1, images.ndim))).min() > 10


def test_a_patient_is_the_same_whatever_the_size_of_the_cohort() -> None:
    small, large = cohort(num_patients=5), cohort(num_patients=40)
    for one, other in zip(small.records, large.records, strict=False):
        assert (one.patient_id, one.name, one.label, one.attributes) == (
            other.patient_id,
            other.name,
            other.label,
            other.attributes,
        )
        assert np.array_equal(one.read().voxels, other.read().voxels)


def test_reading_in_another_order_or_twice_changes_nothing() -> None:
    source = cohort(num_patients=8)
    forwards = [record.read().voxels for record in source.records]
    backwards = [record.read().voxels for record in reversed(source.records)][::-1]
    assert np.array_equal(np.stack(forwards), np.stack(backwards))


def test_another_seed_gives_other_patients() -> None:
    assert not np.array_equal(
        cohort(seed=1, num_patients=1).records[0].read().voxels, cohort(seed=2, num_patients=1).records[0].read().voxels
    )


def test_every_class_and_several_images_for_some_patients_occur() -> None:
    source = cohort(classes=("normal", "a", "b", "c", "d", "e"), num_patients=100)
    assert {record.label for record in source.records} == set(range(6))
    counts = np.unique([record.patient_id for record in source.records], return_counts=True)[1]
    assert set(counts) == {1, 2, 3}
    assert {record.attributes["sex"] for record in source.records} == {"F", "M"}
    assert {record.attributes["site"] for record in source.records} == {"A", "B"}
    assert all(18 <= int(record.attributes["age_years"]) <= 95 for record in source.records)


@pytest.mark.parametrize("anatomy", get_args(AnatomyName))
def test_images_of_one_patient_are_closer_than_those_of_two(anatomy: AnatomyName) -> None:
    source = cohort(anatomy=anatomy, num_patients=80)
    images = stacked(source).reshape(len(source.records), -1)
    images = (images - images.mean(1, keepdims=True)) / images.std(1, keepdims=True)  # exposure is not identity
    patients = np.array([record.patient_id for record in source.records])
    distances = ((images[:, None] - images[None]) ** 2).mean(-1)
    same = (patients[:, None] == patients[None]) & ~np.eye(len(patients), dtype=bool)
    other = patients[:, None] != patients[None]
    assert np.median(distances[same]) < 0.7 * np.median(distances[other])
    assert distances[same].min() > 0.005  # and yet no two are the same picture


def _logistic_auc(images: np.ndarray, labels: np.ndarray, training: np.ndarray) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    model = LogisticRegression(C=0.01, max_iter=1000).fit(images[training], labels[training])
    return float(roc_auc_score(labels[~training], model.decision_function(images[~training])))


@pytest.mark.parametrize("anatomy", get_args(AnatomyName))
def test_the_finding_can_be_learned_but_not_from_the_mean_brightness(anatomy: AnatomyName) -> None:
    source = cohort(anatomy=anatomy, num_patients=700)
    images = stacked(source).reshape(len(source.records), -1) / 127.5 - 1
    labels = np.array([record.label for record in source.records])
    training = np.array([int(record.patient_id[1:]) < 450 for record in source.records])
    assert _logistic_auc(images, labels, training) > 0.75
    assert _logistic_auc(images.mean(1, keepdims=True), labels, training) < 0.65


def test_public_images_vary_more_than_a_cohort_and_are_none_of_its_images() -> None:
    source = cohort(seed=0, num_patients=150)
    private = stacked(source) / 127.5 - 1
    public, labels, patients = phantom_images(
        anatomies=("chest",), num_images=300, spatial_shape=(28, 28), channels=1, num_classes=2, seed=0
    )
    assert public.shape == (300, 1, 28, 28)
    assert public.dtype == np.float32
    assert np.abs(public).max() <= 1
    assert set(labels.tolist()) == {0, 1}
    assert 100 < len(np.unique(patients)) < 300
    assert public.std(axis=0).mean() > 1.15 * private.std(axis=0).mean()
    nearest = ((public.reshape(300, 1, -1) - private.reshape(1, len(private), -1)) ** 2).mean(-1).min()
    assert nearest > 1e-3


def test_public_images_are_a_prefix_of_a_larger_set() -> None:
    few = phantom_images(num_images=7, spatial_shape=(16, 16), channels=1, num_classes=3, seed=4)
    many = phantom_images(num_images=20, spatial_shape=(16, 16), channels=1, num_classes=3, seed=4)
    for one, other in zip(few, many, strict=True):
        assert np.array_equal(one, other[:7])


def test_two_thousand_small_images_take_seconds() -> None:
    start = time.process_time()
    phantom_images(num_images=500, spatial_shape=(28, 28), channels=1, num_classes=2, seed=0)
    assert time.process_time() - start < 5  # a quarter of the images in the time allowed for all: slow machines pass too


@pytest.mark.parametrize(("shape", "channels"), [((28,), 1), ((8, 8, 8, 8), 1), ((28, 28), 2)])
def test_impossible_shapes_are_refused(shape: tuple[int, ...], channels: int) -> None:
    with pytest.raises(DataError):
        phantom_images(num_images=1, spatial_shape=shape, channels=channels, num_classes=2, seed=0)


def test_an_unknown_anatomy_is_refused() -> None:
    with pytest.raises(DataError, match="chest or brain or organ"):
        cohort(anatomy="foot")  # type: ignore[arg-type]
