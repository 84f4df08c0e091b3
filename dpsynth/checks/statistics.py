"""Plain functions of feature matrices, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
_QUERIES, _REFERENCES = 1024, 8192
_FLIPS_A_LEVEL, _FEW_REACHED = 20, 10


def nearest(queries: Array, references: Array, *, own: NDArray[np.int64] | None = None) -> tuple[Array, NDArray[np.int64]]:
    """Distance to and row of the nearest reference, (n,) each; `own` names for each query a row that does not count.

    Both sides come in blocks, so that memory does not grow with their product; float32 finds the row, float64 its distance.
    """
    centre = references.mean(axis=0)
    left, right = (queries - centre).astype(np.float32), (references - centre).astype(np.float32)
    lengths = np.einsum("ij,ij->i", right, right)
    smallest, rows = np.full(len(queries), np.inf, dtype=np.float32), np.zeros(len(queries), dtype=np.int64)
    for begin in range(0, len(references), _REFERENCES):
        block = slice(begin, begin + _REFERENCES)
        for start in range(0, len(queries), _QUERIES):
            part = slice(start, start + _QUERIES)
            squared = lengths[None, block] - 2 * left[part] @ right[block].T
            if own is not None:
                index = np.flatnonzero((own[part] >= begin) & (own[part] < begin + squared.shape[1]))
                squared[index, own[part][index] - begin] = np.inf
            column = squared.argmin(axis=1)
            found = squared[np.arange(len(column)), column]
            better = found < smallest[part]
            rows[part] = np.where(better, column + begin, rows[part])
            smallest[part] = np.where(better, found, smallest[part])
    return np.linalg.norm(queries - references[rows], axis=1), rows


def pairwise(first: Array, second: Array) -> Array:
    """Euclidean distances (n, m)."""
    squared = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * first @ second.T
    return np.asarray(np.sqrt(np.maximum(squared, 0)))


def kid(first: Array, second: Array) -> float:
    """Unbiased squared MMD with the cubic kernel (x.y/d + 1)^3 (Binkowski et al. 2018); may be negative near 0."""
    width = first.shape[1]

    def kernel(a: Array, b: Array) -> Array:
        return np.asarray((a @ b.T / width + 1) ** 3)

    m, n = len(first), len(second)
    own, other = kernel(first, first), kernel(second, second)
    inside = (own.sum() - np.trace(own)) / (m * (m - 1)) + (other.sum() - np.trace(other)) / (n * (n - 1))
    return float(inside - 2 * kernel(first, second).mean())


@dataclass(frozen=True, kw_only=True)
class Neighbourhoods:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020)."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbourhoods(real: Array, synthetic: Array, *, k: int = 5) -> Neighbourhoods:
    """The four measures with balls to the k-th neighbour. real: (n, d), synthetic: (m, d), both larger than k."""
    return neighbourhoods_from(pairwise(real, real), pairwise(real, synthetic), pairwise(synthetic, synthetic), k=k)


def neighbourhoods_from(real: Array, across: Array, synthetic: Array, *, k: int = 5) -> Neighbourhoods:
    """The same from distances among real (n, n), from real to synthetic (n, m) and among synthetic points (m, m)."""
    real_radius, synthetic_radius = _radius(real, k), _radius(synthetic, k)
    inside = across < real_radius[:, None]
    return Neighbourhoods(
        precision=float(inside.any(axis=0).mean()),  # as `in_balls` has it
        recall=float((across < synthetic_radius[None]).any(axis=1).mean()),
        density=float(inside.sum(axis=0).mean() / k),
        coverage=float((across.min(axis=1) < real_radius).mean()),
    )


def in_balls(real: Array, others: Array, *, k: int = 5) -> NDArray[np.bool_]:
    """Which of `others` (m, d) lie in the ball of some real point (n, d) to its k-th neighbour: precision is their share."""
    return np.asarray((pairwise(real, others) < _radius(pairwise(real, real), k)[:, None]).any(axis=0), dtype=np.bool_)


def _radius(among: Array, k: int) -> Array:
    """Distance of each point to its k-th neighbour, (n,), from distances among the points (n, n)."""
    return np.asarray(np.partition(among, k, axis=1)[:, k])


def auc_interval(positive: Array, negative: Array, confidence_level: float) -> tuple[float, float, float]:
    """AUC that positives score higher, with DeLong's interval (DeLong et al. 1988): (auc, low, high)."""
    v10, v01 = structural_components(positive, negative)
    m, n, auc = len(positive), len(negative), v10.mean()
    stddev = float(np.sqrt(np.var(v10, ddof=1) / m + np.var(v01, ddof=1) / n)) if min(m, n) > 1 else 0.5
    half = float(stats.norm.ppf((1 + confidence_level) / 2)) * stddev
    return float(auc), max(0.0, float(auc) - half), min(1.0, float(auc) + half)


def structural_components(positive: Array, negative: Array) -> tuple[Array, Array]:
    """V10 (m,) of positives and V01 (n,) of negatives (DeLong et al. 1988, equation 3) by ranks (Sun and Xu 2014); the AUC is the mean of
    either."""
    ranks, m = stats.rankdata(np.concatenate([positive, negative])), len(positive)
    return (ranks[:m] - stats.rankdata(positive)) / len(negative), 1 - (ranks[m:] - stats.rankdata(negative)) / m


def coin_flip_p(scores: Array, inside: NDArray[np.bool_], *, rng: np.random.Generator, flips: int = 9999, level: float = 1.0) -> float:
    """p-value that patients who are `inside` by a fair coin each have higher scores (n,), exact: the coins are flipped again.

    The statistic is the sum of the centred ranks of those inside; scores must not depend on the coins. Where few flips reach what was
    observed, more follow, so that the smallest p is a twentieth of `level`. It stays exact (Besag and Clifford 1991): a p above what few
    flips allow is at most a value only if that of the first `flips` is, a smaller one only if that of all of them is.
    """
    ranks = stats.rankdata(scores) - (len(scores) + 1) / 2
    observed, reached, done = float(ranks[inside].sum()), 0, 0
    for wanted in (flips, math.ceil(_FLIPS_A_LEVEL / level)):
        if wanted > done and reached < _FEW_REACHED:
            for count in _parts(wanted - done, len(scores)):
                reached += int(np.sum(_coins(count, len(scores), rng) @ ranks >= observed - 1e-9))
            done = wanted
    return (1 + reached) / (1 + done)


def coin_flip_ranks_p(scores: Array, inside: NDArray[np.bool_], *, rng: np.random.Generator, flips: int = 9999) -> tuple[float, int]:
    """p-value that by some row of scores (k, n) patients who are `inside` by a fair coin each rank higher, and that row, exact.

    Not a number: the patient takes no part in that row. The statistic is the largest of the rows' standardised rank sums, so the joint law
    of the rows costs no more than they really differ. Neither scores nor gaps may depend on the coins.
    """
    ranks = np.zeros(scores.shape)
    for row, known in zip(range(len(scores)), np.isfinite(scores), strict=True):
        ranks[row, known] = stats.rankdata(scores[row, known]) - (known.sum() + 1) / 2
    weights = (ranks / np.maximum(np.linalg.norm(ranks, axis=1, keepdims=True), 1e-12)).T

    def statistic(coins: NDArray[np.float32]) -> Array:
        return np.asarray((2 * coins.astype(np.float64) - 1) @ weights)

    observed, reached = statistic(inside[None].astype(np.float32))[0], 0
    for count in _parts(flips, len(inside)):
        reached += int(np.sum(statistic(_coins(count, len(inside), rng)).max(axis=1) >= observed.max() - 1e-9))
    return (1 + reached) / (1 + flips), int(observed.argmax())


def coin_flip_count_p(
    nested: NDArray[np.bool_], inside: NDArray[np.bool_], *, rng: np.random.Generator, flips: int = 9999
) -> tuple[float, int]:
    """p-value that sets of patients hold more who are inside than fair coins make, and the row of the most telling set, exact.

    nested: (sets, n), chosen without the coins. The statistic is the largest (a - b) / sqrt(a + b) over the sets, a inside and b outside.
    """
    sizes = np.maximum(nested.sum(axis=1), 1)

    def statistic(coins: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray((2 * coins - 1) @ nested.T.astype(np.float32) / np.sqrt(sizes).astype(np.float32))

    observed, reached = statistic(inside[None].astype(np.float32))[0], 0
    for count in _parts(flips, nested.shape[1]):
        reached += int(np.sum(statistic(_coins(count, nested.shape[1], rng)).max(axis=1) >= observed.max() - 1e-5))
    return (1 + reached) / (1 + flips), int(observed.argmax())


def _coins(count: int, patients: int, rng: np.random.Generator) -> NDArray[np.float32]:
    return rng.integers(0, 2, (count, patients), dtype=np.int8).astype(np.float32)


def _parts(total: int, patients: int) -> list[int]:
    """Sizes of blocks of coins of about a million each."""
    size = max(1, min(total, 1_000_000 // max(patients, 1)))
    return [size] * (total // size) + ([total % size] if total % size else [])


def standardised(scores: Array) -> Array:
    """Scores (n,) around their median in standard deviations, so that those of several spaces compare; what is not a number stays so."""
    return np.asarray((scores - np.nanmedian(scores)) / max(float(np.nanstd(scores)), 1e-12))


def smallest_detectable_auc(num_training: int, num_control: int, *, false_alarm_rate: float, power: float = 0.8) -> float:
    """AUC that a one-sided rank test finds with the given power, by the normal approximation under the null variance."""
    stddev = np.sqrt((num_training + num_control + 1) / (12 * num_training * num_control))
    return float(0.5 + (stats.norm.ppf(1 - false_alarm_rate) + stats.norm.ppf(power)) * stddev)


def only_above(detectable: float) -> str:
    """What a test says that is too weak, of the smallest AUC that it would have seen."""
    return f"only an AUC above {detectable:.2f} could be seen" if detectable < 1 else "no AUC could be seen"


def clopper_pearson(successes: int, trials: int, confidence_level: float) -> tuple[float, float]:
    """Exact interval of a rate."""
    if trials == 0:
        return 0.0, 1.0
    tail = (1 - confidence_level) / 2
    low = 0.0 if successes == 0 else float(stats.beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(stats.beta.ppf(1 - tail, successes + 1, trials - successes))
    return low, high


def share_interval(share: float, stddev: float, trials: int, confidence_level: float) -> tuple[float, float]:
    """Interval of a share that was not counted in independent trials: Clopper and Pearson's with as many trials as would give its
    standard deviation, never more than there were (Korn and Graubard 1998)."""
    effective = float(trials)
    if stddev > 0 and 0 < share < 1:
        effective = min(effective, share * (1 - share) / stddev**2)
    tail, hits = (1 - confidence_level) / 2, share * effective
    low = 0.0 if hits <= 0 else float(stats.beta.ppf(tail, hits, effective - hits + 1))
    high = 1.0 if hits >= effective else float(stats.beta.ppf(1 - tail, hits + 1, effective - hits))
    return low, high


def wilson(successes: int, trials: int, confidence_level: float) -> tuple[float, float]:
    """Interval of a rate (Wilson 1927)."""
    if trials == 0:
        return 0.0, 1.0
    z = float(stats.norm.ppf((1 + confidence_level) / 2))
    rate, weight = successes / trials, z**2 / trials
    half = z * float(np.sqrt(rate * (1 - rate) / trials + weight / (4 * trials)))
    return max(0.0, (rate + weight / 2 - half) / (1 + weight)), min(1.0, (rate + weight / 2 + half) / (1 + weight))


def difference_of_rates(first: tuple[int, int], second: tuple[int, int], confidence_level: float) -> tuple[float, float]:
    """Interval of the difference of two independent rates, each as successes and trials (Newcombe 1998, method 10)."""
    (a, m), (b, n) = first, second
    if not (m and n):
        return -1.0, 1.0
    (low_a, high_a), (low_b, high_b) = wilson(a, m, confidence_level), wilson(b, n, confidence_level)
    difference = a / m - b / n
    below = float(np.hypot(a / m - low_a, high_b - b / n))
    return difference - below, difference + float(np.hypot(high_a - a / m, b / n - low_b))
