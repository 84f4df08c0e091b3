"""DeLong's test and interval for several images a patient: published numbers, slow loops, coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dpsynth.checks.classifier import auc
from dpsynth.checks.delong import auc_difference
from dpsynth.checks.utility import difference_interval

# 43 complete of the 49 patients of DeLong et al. 1988: albumin, total protein, K-G score, whether surgery helped (SAS/STAT, PROC LOGISTIC,
# example "Comparing Receiver Operating Characteristic Curves").
OVARIAN = np.fromstring(
    "3.0 5.8 10 0 3.2 6.3 5 1 3.9 6.8 3 1 2.8 4.8 6 0 3.2 5.8 3 1 0.9 4.0 5 0 2.5 5.7 8 0 1.6 5.6 5 1 3.8 5.7 5 1 3.7 6.7 6 1 "
    "3.2 5.4 4 1 3.8 6.6 6 1 4.1 6.6 5 1 3.6 5.7 5 1 4.3 7.0 4 1 3.6 6.7 4 0 2.3 4.4 6 1 4.2 7.6 4 0 4.0 6.6 6 0 3.5 5.8 6 1 "
    "3.8 6.8 7 1 3.0 4.7 8 0 4.5 7.4 5 1 3.7 7.4 5 1 3.1 6.6 6 1 4.1 8.2 6 1 4.3 7.0 5 1 4.3 6.5 4 1 3.2 5.1 5 1 2.6 4.7 6 1 "
    "3.3 6.8 6 0 1.7 4.0 7 0 3.7 6.1 5 1 3.3 6.3 7 1 4.2 7.7 6 1 3.5 6.2 5 1 2.9 5.7 9 0 2.1 4.8 7 1 2.8 6.2 8 0 4.0 7.0 7 1 "
    "3.3 5.7 6 1 3.7 6.9 5 1 3.6 6.6 5 1",
    sep=" ",
).reshape(-1, 4)


def two(scores: np.ndarray) -> np.ndarray:
    return np.stack([-scores, scores], axis=1)


@pytest.mark.parametrize(
    ("column", "difference", "error", "chi_square", "p"), [(0, 0.0108, 0.0953, 0.0127, 0.9102), (1, -0.0780, 0.1046, 0.5554, 0.4561)]
)
def test_the_published_comparison_of_three_tests(column: int, difference: float, error: float, chi_square: float, p: float) -> None:
    found = auc_difference(
        two(OVARIAN[:, column]), two(10 - OVARIAN[:, 2]), OVARIAN[:, 3].astype(np.int64), np.arange(len(OVARIAN), dtype=np.int64)
    )
    assert found.estimate == pytest.approx(difference, abs=6e-5)
    assert found.stddev == pytest.approx(error, abs=6e-5)
    assert (found.estimate / found.stddev) ** 2 == pytest.approx(chi_square, abs=6e-5)
    assert found.p == pytest.approx(p, abs=6e-5)


def clustered(
    rng: np.random.Generator, patients: int = 60, *, gap: float = 0.0, mixed: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scores of two classifiers on 1 to 6 images a patient, which share most of their error; labels by patient, or by image."""
    owners = np.repeat(np.arange(patients), rng.integers(1, 7, patients))
    labels = rng.integers(0, 2, len(owners)) if mixed else (np.arange(patients) % 2)[owners]
    shared = rng.normal(0, 1, (patients, 3))[owners]
    first = labels * (1.2 + gap) + shared[:, 0] + 0.7 * shared[:, 1] + 0.3 * rng.normal(0, 1, len(owners))
    second = labels * 1.2 + shared[:, 0] + 0.7 * shared[:, 2] + 0.3 * rng.normal(0, 1, len(owners))
    return two(first), two(second), labels.astype(np.int64), owners.astype(np.int64)


def obuchowski(first: np.ndarray, second: np.ndarray, labels: np.ndarray, owners: np.ndarray) -> tuple[float, float]:
    """Difference and its variance by loops over pairs and patients (Obuchowski 1997, equations 2 to 6)."""
    positive, negative = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    m, n, patients = len(positive), len(negative), len(np.unique(owners))

    def won(scores: np.ndarray) -> np.ndarray:
        return np.array([[(scores[a] > scores[b]) + 0.5 * (scores[a] == scores[b]) for b in negative] for a in positive])

    table = won(first) - won(second)
    difference, v10, v01 = table.mean(), table.mean(axis=1), table.mean(axis=0)
    ours = [sum(v10[k] - difference for k, image in enumerate(positive) if owners[image] == who) for who in range(patients)]
    theirs = [sum(v01[k] - difference for k, image in enumerate(negative) if owners[image] == who) for who in range(patients)]
    i10, i01 = len(np.unique(owners[positive])), len(np.unique(owners[negative]))
    s10 = i10 / ((i10 - 1) * m) * sum(x * x for x in ours)
    s01 = i01 / ((i01 - 1) * n) * sum(x * x for x in theirs)
    s11 = patients / (patients - 1) * sum(x * y for x, y in zip(ours, theirs, strict=True))
    return float(difference), float(s10 / m + s01 / n + 2 * s11 / (m * n))


@pytest.mark.parametrize(("mixed", "tolerance"), [(False, 1e-9), (True, 0.02)])
def test_by_loops_over_pairs(mixed: bool, tolerance: float) -> None:
    """Exact when a patient's images have one label; but for the factor of the mixed term when they do not."""
    first, second, labels, owners = clustered(np.random.default_rng(0), 40, mixed=mixed)
    first = np.round(first, 1)  # ties
    found = auc_difference(first, second, labels, owners)
    difference, variance = obuchowski(first[:, 1], second[:, 1], labels, owners)
    assert found.estimate == pytest.approx(difference)
    assert found.estimate == pytest.approx(auc(first, labels) - auc(second, labels))
    assert found.stddev**2 == pytest.approx(variance, rel=tolerance)


def test_three_classes_by_the_jackknife_over_patients() -> None:
    rng = np.random.default_rng(1)
    owners = np.repeat(np.arange(80), rng.integers(1, 4, 80))
    labels = rng.integers(0, 3, 80)[owners]
    sides = [np.eye(3)[labels] + rng.normal(0, 0.8, (80, 3))[owners] + rng.normal(0, 0.4, (len(owners), 3)) for _ in range(2)]
    found = auc_difference(sides[0], sides[1], labels, owners)
    without = []
    for who in range(80):
        kept = owners != who
        without.append(auc(sides[0][kept], labels[kept]) - auc(sides[1][kept], labels[kept]))
    jackknife = np.sqrt(79 / 80 * np.sum((np.array(without) - np.mean(without)) ** 2))
    assert found.estimate == pytest.approx(auc(sides[0], labels) - auc(sides[1], labels))
    assert found.stddev == pytest.approx(jackknife, rel=0.05)


def coverage(truth: float, repetitions: int, *, bootstrap: bool, as_single: bool = False, gap: float = 0.5) -> int:
    covered = 0
    for seed in range(repetitions):
        rng = np.random.default_rng(seed)
        first, second, labels, owners = clustered(rng, gap=gap)
        if as_single:
            owners = np.arange(len(labels))
        rows_of = [np.flatnonzero(owners == who) for who in range(owners.max() + 1)]
        if bootstrap:
            low, high = difference_interval(first, second, labels, rows_of, rng, confidence_level=0.9)
        else:
            low, high = auc_difference(first, second, labels, owners).interval(0.9)
        covered += low <= truth <= high
    return covered


def true_difference(gap: float = 0.5) -> float:
    """AUCs of normal scores with variance 1 + 0.49 + 0.09."""
    spread = np.sqrt(2 * (1 + 0.49 + 0.09))
    return float(stats.norm.cdf((1.2 + gap) / spread) - stats.norm.cdf(1.2 / spread))


def test_the_interval_covers_as_stated_by_patient_and_not_by_image() -> None:
    """Counting each image as a patient is the usual mistake: its intervals must be seen to be too short."""
    by_patient, by_image = (coverage(true_difference(), 300, bootstrap=False, as_single=single) for single in (False, True))
    assert 0.85 < by_patient / 300 < 0.95, by_patient
    assert by_image / 300 < 0.80, by_image


@pytest.mark.slow
def test_both_intervals_cover_alike() -> None:
    """The bootstrap over patients, by which utility is decided, beside the formula; figures are in docs/checks.md."""
    found = {name: coverage(true_difference(), 400, bootstrap=name == "bootstrap") / 400 for name in ("bootstrap", "formula")}
    print(found)
    assert min(found.values()) > 0.84
    assert max(found.values()) < 0.95


def test_equal_classifiers_differ_by_nothing_and_one_class_is_refused() -> None:
    first, _, labels, owners = clustered(np.random.default_rng(2), 20)
    same = auc_difference(first, first, labels, owners)
    assert (same.estimate, same.stddev, same.p) == (0, 0, 1)
    with pytest.raises(ValueError, match="two classes"):
        auc_difference(first, first, np.zeros_like(labels), owners)
