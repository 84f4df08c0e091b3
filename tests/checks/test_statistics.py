"""The statistics behind the checks, against slow or independent ways to compute them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score

from dpsynth.checks import statistics
from dpsynth.checks.statistics import (
    auc_interval,
    clopper_pearson,
    coin_flip_count_p,
    coin_flip_p,
    kid,
    nearest,
    neighbourhoods,
    pairwise,
    smallest_detectable_auc,
)


def normal(count: int, seed: int, *, width: int = 6, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (count, width))


def test_distances_and_nearest() -> None:
    a, b = normal(1100, 0), normal(40, 1)
    assert np.allclose(pairwise(a, b), cdist(a, b), atol=1e-6)
    distances, rows = nearest(a, b)
    assert np.array_equal(rows, cdist(a, b).argmin(1))
    assert np.allclose(distances, cdist(a, b).min(1), atol=1e-6)
    own, rows = nearest(a, a, own=np.arange(len(a)))
    alone = cdist(a, a)
    np.fill_diagonal(alone, np.inf)
    assert np.array_equal(rows, alone.argmin(1))
    assert np.allclose(own, alone.min(1), atol=1e-6)


def test_kid_is_the_unbiased_estimate() -> None:
    a, b = normal(7, 0), normal(5, 1)
    kernel = lambda x, y: (float(x @ y) / 6 + 1) ** 3  # noqa: E731
    inside_a = np.mean([kernel(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
    inside_b = np.mean([kernel(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    across = np.mean([kernel(x, y) for x in a for y in b])
    assert kid(a, b) == pytest.approx(inside_a + inside_b - 2 * across)
    equal = [kid(normal(30, 2 * seed), normal(30, 2 * seed + 1)) for seed in range(200)]
    error = np.std(equal) / np.sqrt(len(equal))
    assert abs(np.mean(equal)) < 4 * error
    assert min(equal) < 0
    assert np.mean([kid(normal(30, seed), normal(30, seed + 500, shift=0.5)) for seed in range(50)]) > 10 * error


def test_neighbourhood_measures_by_loops() -> None:
    real, synthetic, k = normal(30, 0), normal(25, 1, shift=0.3), 3
    radius = lambda points, row: sorted(np.linalg.norm(points - points[row], axis=1))[k]  # noqa: E731
    inside = lambda x, points: [np.linalg.norm(x - point) < radius(points, row) for row, point in enumerate(points)]  # noqa: E731
    found = neighbourhoods(real, synthetic, k=k)
    assert found.precision == pytest.approx(np.mean([any(inside(x, real)) for x in synthetic]))
    assert found.recall == pytest.approx(np.mean([any(inside(x, synthetic)) for x in real]))
    assert found.density == pytest.approx(np.sum([inside(x, real) for x in synthetic]) / (k * len(synthetic)))
    near = [min(np.linalg.norm(synthetic - x, axis=1)) < radius(real, row) for row, x in enumerate(real)]
    assert found.coverage == pytest.approx(np.mean(near))


def test_neighbourhood_measures_at_their_ends() -> None:
    points = normal(60, 0)
    same, far = neighbourhoods(points, points + 1e-9), neighbourhoods(points, points + 100)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    outermost = points[np.linalg.norm(points, axis=1).argmax()]
    one_mode = neighbourhoods(points, outermost + 1e-3 * normal(60, 1))
    assert one_mode.precision == 1
    assert one_mode.recall < 0.1
    assert one_mode.coverage < 0.2


def test_auc_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    inside, covered, repetitions = rng.normal(1, 1, 40), 0, 400
    truth = stats.norm.cdf(1 / np.sqrt(2))
    outside = rng.normal(0, 1, 60)
    labels = np.r_[np.ones(40), np.zeros(60)]
    assert auc_interval(inside, outside, 0.9)[0] == pytest.approx(roc_auc_score(labels, np.r_[inside, outside]))
    for _ in range(repetitions):
        _, low, high = auc_interval(rng.normal(1, 1, 40), rng.normal(0, 1, 60), 0.9)
        covered += low <= truth <= high
    assert stats.binomtest(covered, repetitions, 0.9).pvalue > 1e-3
    with_ties = auc_interval(np.array([1.0, 1, 2]), np.array([1.0, 0, 2]), 0.95)[0]
    assert with_ties == pytest.approx(roc_auc_score([1, 1, 1, 0, 0, 0], [1, 1, 2, 1, 0, 2]))


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (0, 0)])
def test_clopper_pearson(successes: int, trials: int) -> None:
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, "exact") if trials else (0, 1)
    assert clopper_pearson(successes, trials, 0.95) == pytest.approx(tuple(expected))


def test_the_smallest_detectable_auc_is_found_as_often_as_stated() -> None:
    rng, found, repetitions = np.random.default_rng(0), 0, 300
    auc = smallest_detectable_auc(150, 80, false_alarm_rate=0.01, power=0.8)
    shift = np.sqrt(2) * stats.norm.ppf(auc)
    for _ in range(repetitions):
        found += stats.mannwhitneyu(rng.normal(shift, 1, 150), rng.normal(0, 1, 80), alternative="greater").pvalue < 0.01
    assert 0.7 < found / repetitions < 0.9


def test_blocks_do_not_change_the_nearest_and_copies_lie_at_distance_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(300, 0, shift=50.0), normal(200, 1, shift=50.0)  # far from the origin, where float32 alone would lose digits
    a[:20] = b[30:50]
    whole = nearest(a, b)
    monkeypatch.setattr(statistics, "_QUERIES", 7)
    monkeypatch.setattr(statistics, "_REFERENCES", 13)
    distances, rows = nearest(a, b, own=None)
    assert np.array_equal(rows, whole[1])
    assert np.array_equal(rows, cdist(a, b).argmin(1))
    assert np.allclose(distances, cdist(a, b).min(1), atol=1e-9)
    assert float(distances[:20].max()) == 0
    own = nearest(a, b, own=rows)[0]
    assert np.allclose(own, np.sort(cdist(a, b), axis=1)[:, 1], atol=1e-9)


def test_the_coin_flip_test_is_the_rank_test_when_the_sides_are_equal() -> None:
    rng = np.random.default_rng(0)
    scores, inside = rng.normal(0, 1, 200), np.arange(200) < 100
    scores[inside] += 0.25
    exact = stats.mannwhitneyu(scores[inside], scores[~inside], alternative="greater").pvalue
    assert coin_flip_p(scores, inside, rng=rng) == pytest.approx(exact, rel=0.35)


def test_coin_flips_have_the_stated_false_alarms_and_find_an_excess() -> None:
    rng, low, repetitions = np.random.default_rng(1), {"ranks": 0, "counts": 0}, 300
    for _ in range(repetitions):
        inside = rng.random(60) < 0.5
        scores = rng.normal(0, 1, 60)
        low["ranks"] += coin_flip_p(scores, inside, rng=rng, flips=199) <= 0.05
        low["counts"] += coin_flip_count_p(np.array([scores > 1.5, scores > 0.5, scores > -0.5]), inside, rng=rng, flips=199)[0] <= 0.05
    for count in low.values():
        assert stats.binom.sf(count - 1, repetitions, 0.05) > 1e-4, low
    inside = np.arange(60) < 30
    seven = np.zeros((2, 60), dtype=bool)
    seven[0, :8] = True
    seven[1, :8] = seven[1, 20:40] = True
    p, telling = coin_flip_count_p(seven, inside, rng=rng)
    assert telling == 0
    assert p == pytest.approx(0.5**8, rel=1.2)
    assert coin_flip_count_p(np.zeros((2, 60), dtype=bool), inside, rng=rng, flips=99)[0] == 1
