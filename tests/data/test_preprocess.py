"""Resampling and intensities against pictures whose result is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from dpsynth.config import DataConfig
from dpsynth.data.cohort import Cohort, Image, Record
from dpsynth.data.phantom import phantom_cohort
from dpsynth.data.preprocess import Preprocess, prepare
from dpsynth.errors import DataError
from dpsynth.privacy.unit import PrivacyUnit
from dpsynth.progress import silent


def ramp(*shape: int) -> np.ndarray:
    """Brightness grows along the last axis from 0 to 255, (1, *shape)."""
    return np.broadcast_to(np.linspace(0, 255, shape[-1], dtype=np.float32), (1, *shape)).copy()


def test_public_range_becomes_minus_one_to_one_and_is_clamped() -> None:
    stored = np.full((1, 8, 8), 100.0, dtype=np.float32)
    stored[0, 0, :4] = [-1000, 0, 200, 5000]
    result = Preprocess((8, 8), (0.0, 200.0))(stored)
    assert np.allclose(result[0, 0, :5], [-1, -1, 1, 1, 0], atol=1e-6)


def test_each_image_by_its_own_percentiles_does_not_depend_on_its_units() -> None:
    stored = np.random.default_rng(0).normal(size=(1, 40, 40)).astype(np.float32)
    first, second = (Preprocess((40, 40), "each")(voxels) for voxels in (stored, 1e4 * stored + 7))
    assert np.allclose(first, second, atol=1e-4)
    assert (first.min(), first.max()) == (-1, 1)
    assert 0.004 < np.mean(first == 1) < 0.007  # half a percent is clamped


def test_halving_averages_blocks_of_pixels() -> None:
    stored = np.random.default_rng(0).uniform(0, 255, (1, 16, 16)).astype(np.float32)
    expected = stored.reshape(8, 2, 8, 2).mean(axis=(1, 3)) / 127.5 - 1
    assert np.allclose(Preprocess((8, 8), (0.0, 255.0))(stored)[0], expected, atol=1e-5)


def test_a_patient_s_images_do_not_depend_on_who_else_is_in_the_data() -> None:
    cohort = phantom_cohort(
        anatomy="chest", num_patients=30, max_images=3, spatial_shape=(20, 20), channels=1, classes=("a", "b"), seed=3, name="x"
    )
    config = DataConfig(classes=("a", "b"), spatial_shape=(16, 16), max_images_per_patient=2)
    whole = prepare(cohort, config, progress=silent)
    for left_out in (whole.patient_ids[0], whole.patient_ids[17]):
        fewer = Cohort(
            name="x", unit=cohort.unit, classes=cohort.classes, records=tuple(r for r in cohort.records if r.patient_id != left_out)
        )
        rows = [row for row, patient in enumerate(whole.patients) if whole.patient_ids[patient] != left_out]
        assert np.array_equal(prepare(fewer, config, progress=silent).images, whole.images[rows])


def test_a_fine_pattern_does_not_alias() -> None:
    stored = np.tile(np.array([0, 255, 255, 0], dtype=np.float32), (1, 32, 8))
    assert np.abs(Preprocess((8, 8), (0.0, 255.0))(stored)).max() < 1e-5


@pytest.mark.parametrize(("shape", "target"), [((8, 8), (16, 16)), ((8, 8, 8), (12, 12, 12)), ((64, 64), (28, 28))])
def test_a_ramp_stays_a_ramp(shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    result = Preprocess(target, (0.0, 255.0))(ramp(*shape))
    assert result.shape == (1, *target)
    line = result.reshape(-1, target[-1]).mean(0)
    assert (np.diff(line) > -1e-6).all()
    assert np.allclose(line, -line[::-1], atol=1e-4)
    assert np.abs(result - line).max() < 1e-5


@pytest.mark.parametrize("shape", [(40, 20), (20, 40)])
def test_the_aspect_is_kept_and_the_centre_cut_out(shape: tuple[int, int]) -> None:
    stored = np.zeros((1, *shape), dtype=np.float32)
    middle, radius = (shape[0] / 2 - 0.5, shape[1] / 2 - 0.5), 6
    rows, columns = np.indices(shape)
    stored[0] = 255.0 * ((rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < radius**2)
    disc = Preprocess((20, 20), (0.0, 255.0))(stored)[0] > 0
    assert abs(int(disc.any(0).sum()) - int(disc.any(1).sum())) <= 1  # still a disc
    assert disc.sum() == (stored > 0).sum()


def test_the_aspect_is_that_in_millimetres() -> None:
    stored = ramp(10, 40)
    result = Preprocess((20, 20), (0.0, 255.0))(stored, spacing_mm=(4.0, 1.0))
    assert result.shape == (1, 20, 20)
    assert result[0, 0, 0] < -0.9  # the whole width is seen: nothing was cut off
    assert result[0, 0, -1] > 0.9
    assert Preprocess((20, 20), (0.0, 255.0))(stored)[0, 0, 0] > -0.5  # square pixels: the ends are cut off


def test_the_size_asked_for_is_left_alone() -> None:
    stored = np.random.default_rng(0).integers(0, 256, (3, 8, 12)).astype(np.float32)
    assert np.allclose(Preprocess((8, 12), (0.0, 255.0))(stored) * 127.5 + 127.5, stored, atol=1e-4)


def some_cohort(shapes: Mapping[str, tuple[int, ...]]) -> Cohort:
    """Images of 24 patients, 8x8 unless `shapes` names another for an image."""
    records = []
    for number in range(24):
        for index in range(5):
            name = f"P{number}/{index}"
            voxels = np.random.default_rng(number * 10 + index).uniform(0, 255, (1, *shapes.get(name, (8, 8)))).astype(np.float32)
            records.append(
                Record(
                    patient_id=f"P{number}",
                    name=name,
                    label=number % 2,
                    attributes={"index": str(index)},
                    read=lambda voxels=voxels: Image(voxels=voxels),
                )
            )
    return Cohort(name="x", unit=PrivacyUnit.PATIENT, classes=("a", "b"), records=tuple(records[::-1]))


CONFIG = DataConfig(spatial_shape=(8, 8), classes=("a", "b"), max_images_per_patient=3)


def test_the_first_images_of_each_patient_by_name_are_kept() -> None:
    images = prepare(some_cohort({}), CONFIG, progress=silent)
    assert images.num_patients == 24
    assert np.bincount(images.patients).tolist() == [3] * 24
    assert {row["index"] for row in images.attributes} == {"0", "1", "2"}
    for row in range(len(images.images)):
        assert images.labels[row] == int(images.patient_ids[images.patients[row]][1:]) % 2
    assert images.images.flags["C_CONTIGUOUS"]


def test_images_of_different_sizes_are_fine() -> None:
    images = prepare(some_cohort({"P3/0": (30, 20), "P4/1": (8, 9)}), CONFIG, progress=silent)
    assert images.images.shape == (72, 1, 8, 8)


def test_a_volume_among_pictures_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="P3/0"):
        prepare(some_cohort({"P3/0": (8, 8, 8)}), CONFIG, progress=silent)


def test_an_image_that_is_all_but_constant_cannot_be_scaled_by_itself() -> None:
    cohort = some_cohort({})
    voxels = np.zeros((1, 40, 40), dtype=np.float32)
    voxels[0, 3, 4] = 1000
    flat = replace(cohort.records[0], read=lambda: Image(voxels=voxels))
    broken = replace(cohort, records=(flat, *cohort.records[1:]))
    config = CONFIG.model_copy(update={"intensity_range": "each", "mixed_sizes": True, "max_images_per_patient": 5})
    with pytest.raises(DataError, match=f"{flat.name}: nothing is left"):
        prepare(broken, config, progress=silent)


def test_progress_ends_with_all_images() -> None:
    seen: list[tuple[int, int]] = []

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        seen.append((done, total))

    prepare(some_cohort({}), CONFIG, progress=progress)
    assert seen[-1] == (72, 72)


def test_volumes_of_phantoms() -> None:
    cohort = phantom_cohort(
        anatomy="brain",
        num_patients=24,
        max_images=1,
        spatial_shape=(12, 12, 12),
        channels=1,
        classes=("a", "b"),
        seed=0,
        name="x",
    )
    config = DataConfig(spatial_shape=(8, 8, 8), classes=("a", "b"))
    assert prepare(cohort, config, progress=silent).images.shape == (24, 1, 8, 8, 8)
