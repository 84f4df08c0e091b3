"""Figures about the images against plain loops and closed forms, and that each one moves when what it measures is spoilt."""

from __future__ import annotations

import math

import numpy as np
import pytest
from evidence_cases import evidence_of, features_of, image_set
from scipy import stats

from dpsynth.checks.arms import brier, calibration_error, train_arms
from dpsynth.checks.classifier import auc
from dpsynth.checks.description import describe, diversity, histogram_distance, kid_interval, scale_weights
from dpsynth.checks.evidence import first_images
from dpsynth.checks.radiomics import FIRST_ORDER, LEVELS, NAMES, benjamini_hochberg, cooccurrence, kolmogorov_smirnov, levels, radiomics
from dpsynth.checks.utility import rank_auc
from dpsynth.data.phantom import phantom_cohort
from dpsynth.model.descriptors import descriptors
from dpsynth.progress import silent


def phantoms(count: int, seed: int, side: int = 24) -> tuple[np.ndarray, np.ndarray]:
    cohort = phantom_cohort(
        anatomy="chest", num_patients=count, max_images=1, spatial_shape=(side, side), channels=1, classes=("a", "b"), seed=seed, name="x"
    )
    images = np.stack([record.read().voxels for record in cohort.records]).astype(np.float32) / 127.5 - 1
    return images, np.array([record.label for record in cohort.records])


def test_cooccurrence_is_the_plain_loop_over_neighbours() -> None:
    rng = np.random.default_rng(0)
    for shape in ((5, 4), (3, 4, 3)):
        grey = rng.uniform(-1, 1, (2, *shape))
        quantised = levels(grey)
        expected = np.zeros((2, LEVELS, LEVELS))
        for n in range(2):
            for place in np.ndindex(*shape):
                for other in np.ndindex(*shape):
                    if max(abs(a - b) for a, b in zip(place, other, strict=True)) == 1:
                        expected[n, quantised[n][place], quantised[n][other]] += 1
            expected[n] /= expected[n].sum()
        np.testing.assert_allclose(cooccurrence(quantised), expected)


def test_radiomics_by_hand() -> None:
    """A checkerboard of the two ends: every number can be told without a computer."""
    board = np.where(np.indices((8, 8)).sum(axis=0) % 2, 1.0, -1.0).astype(np.float32)[None, None]
    found = dict(zip(NAMES, radiomics(board)[0], strict=True))
    straight, diagonal = 2 * 7 * 8, 2 * 7 * 7  # neighbouring pairs that differ, and that are equal
    share = straight / (straight + diagonal)
    assert found["mean"] == pytest.approx(0)
    assert found["standard deviation"] == pytest.approx(1)
    assert found["skewness"] == pytest.approx(0)
    assert found["kurtosis"] == pytest.approx(-2)
    assert found["entropy"] == pytest.approx(1)
    assert found["uniformity"] == pytest.approx(0.5)
    assert found["contrast"] == pytest.approx(share * 15**2)
    assert found["dissimilarity"] == pytest.approx(share * 15)
    assert found["homogeneity"] == pytest.approx(share / 226 + 1 - share)
    assert found["correlation"] == pytest.approx(1 - 2 * share)
    assert found["joint entropy"] == pytest.approx(-share * math.log2(share / 2) - (1 - share) * math.log2((1 - share) / 2))
    assert np.isfinite(radiomics(np.zeros((1, 1, 8, 8), dtype=np.float32))).all(), "a constant image has features too"


def test_first_order_features_are_those_of_scipy() -> None:
    images = np.random.default_rng(1).beta(2, 5, (3, 1, 9, 9)).astype(np.float32)
    flat = images.reshape(3, -1).astype(np.float64)
    found = radiomics(images)[:, : len(FIRST_ORDER)]
    np.testing.assert_allclose(found[:, 2], stats.skew(flat, axis=1))
    np.testing.assert_allclose(found[:, 3], stats.kurtosis(flat, axis=1))


def test_benjamini_hochberg_is_that_of_scipy_and_keeps_its_rate() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.uniform(0, 1, 14) ** rng.integers(1, 5)
        np.testing.assert_array_equal(benjamini_hochberg(p, 0.05), stats.false_discovery_control(p) <= 0.05)
    alarms = sum(benjamini_hochberg(kolmogorov_smirnov(*rng.normal(size=(2, 80, 14)))[1], 0.05).any() for _ in range(200))
    assert stats.binom.sf(alarms - 1, 200, 0.05) > 1e-4, alarms


def test_kid_has_no_bias_and_its_interval_sees_a_shift() -> None:
    """Over 60 pairs of samples of one distribution the mean is 0 within its error; a shift of 0.7 lies outside."""
    rng = np.random.default_rng(0)
    values = [kid_interval(*rng.normal(size=(2, 200, 8)), rng=rng)[0] for _ in range(60)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(60)
    assert min(kid_interval(rng.normal(size=(200, 8)), rng.normal(size=(200, 8)) + 0.7, rng=rng)[1]) > 0


def test_kid_of_one_block_has_no_interval() -> None:
    """One block can be drawn in one way: the interval would have no width, and look like certainty."""
    rng = np.random.default_rng(0)
    small, large = (rng.normal(size=(2, count, 8)) for count in (99, 100))
    assert kid_interval(*small, rng=rng)[1] == ()
    low, high = kid_interval(*large, rng=rng)[1]
    assert low < high
    for count in (60, 120):
        images, labels = phantoms(count, 1, side=16)
        sets = evidence_of(image_set(images, labels), image_set(images, labels), images, labels)
        encoded = [rng.normal(size=(count, 6)) for _ in range(3)]
        figures = describe(sets, features_of(*encoded), rng=rng, progress=silent)
        assert ("KID lower limit, synthetic" in figures) is (count == 120)
        assert "KID, real" in figures


def test_scales_are_as_many_as_the_size_allows() -> None:
    assert [len(scale_weights(side)) for side in (8, 15, 16, 20, 28, 36, 64)] == [2, 2, 3, 3, 3, 4, 5]
    assert sum(scale_weights(20)) == pytest.approx(1)
    for side in (8, 16, 64):
        images = np.random.default_rng(0).uniform(-1, 1, (12, 1, side, side)).astype(np.float32)
        assert diversity(np.repeat(images[:1], 12, axis=0), rng=np.random.default_rng(0)) == pytest.approx(1, abs=1e-5)
        assert diversity(images, rng=np.random.default_rng(0)) < 0.5


def test_the_histogram_distance_of_a_shift_is_the_shift() -> None:
    images = np.random.default_rng(0).uniform(-0.5, 0.5, (20, 1, 16, 16)).astype(np.float32)
    assert histogram_distance(images, images + 0.25) == pytest.approx(0.25, abs=1e-5)


SPOILT = {
    "histogram distance": lambda images: images * 0.7,
    "spectrum distance (dB)": lambda images: (images + np.roll(images, 1, 2) + np.roll(images, 1, 3)) / 3,
    "MS-SSIM among pairs": lambda images: np.repeat(images[:5], len(images) // 5, axis=0),
    "KS of contrast": lambda images: np.clip(images + np.random.default_rng(0).normal(0, 0.15, images.shape), -1, 1),
    "FD of bands": lambda images: images[:, :, ::-1],
}


@pytest.mark.parametrize("figure", SPOILT)
def test_each_figure_is_near_real_for_real_images_and_far_for_what_it_measures(figure: str) -> None:
    training, control, synthetic = (phantoms(150, seed) for seed in (1, 2, 3))
    sides = [image_set(*side) for side in (training, control)]

    def described(images: np.ndarray) -> dict[str, float]:
        sets = evidence_of(sides[0], sides[1], images, synthetic[1])
        encoded = [descriptors(side) for side in (sets.synthetic, first_images(sets.training), first_images(sets.control))]
        return describe(sets, features_of(*encoded), rng=np.random.default_rng(0), progress=silent)

    honest, spoilt = described(synthetic[0]), described(SPOILT[figure](synthetic[0]))
    real = honest[f"{figure}, real"]
    assert abs(honest[f"{figure}, synthetic"] - real) < 0.5 * abs(spoilt[f"{figure}, synthetic"] - real)
    assert spoilt[f"{figure}, real"] == real
    assert honest["radiomics that differ of 14, real"] <= 2


@pytest.mark.parametrize("classes", [2, 3])
def test_the_area_from_ranks_is_that_of_the_curve(classes: int) -> None:
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet(np.ones(classes), 90).round(2), rng.integers(0, classes, 90)
    assert rank_auc(probabilities, labels) == pytest.approx(auc(probabilities, labels), abs=1e-12)


def test_calibration_by_hand() -> None:
    sure = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert brier(sure, np.array([0, 1])) == pytest.approx(1.0)
    assert calibration_error(sure, np.array([0, 1])) == pytest.approx(0.5)
    assert calibration_error(np.array([[0.5, 0.5]] * 4), np.array([0, 1, 0, 1])) == pytest.approx(0)
    rng = np.random.default_rng(0)
    p = rng.uniform(0, 1, 20_000)
    labels = (rng.uniform(size=20_000) < p).astype(np.int64)
    assert calibration_error(np.stack([1 - p, p], axis=1), labels) < 0.02
    assert calibration_error(np.stack([1 - p**3, p**3], axis=1), labels) > 0.05


def test_labels_that_are_not_what_they_look_like_are_seen_and_arms_are_trained_on_what_they_say() -> None:
    from test_decisions import bars

    images, labels = bars(160, 2)
    sets = evidence_of(image_set(*bars(160, 0)), image_set(*bars(120, 1)), images, 1 - labels)
    arms = train_arms(sets, seed=0, progress=silent)
    assert (arms.synthetic_by_real.argmax(axis=1) == labels).mean() > 0.9, "of the swapped labels it would agree with hardly any"
    assert (arms.real.argmax(axis=1) == sets.control.labels).mean() > 0.9
    assert (arms.synthetic.argmax(axis=1) == sets.control.labels).mean() < 0.2
