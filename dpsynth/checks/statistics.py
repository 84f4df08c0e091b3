"""Plain functions of feature matrices, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
_BLOCK = 1024


def nearest(queries: Array, references: Array, *, exclude_self: bool = False) -> tuple[Array, NDArray[np.int64]]:
    """Distance to and row of the nearest reference, (n,) each, in blocks so that memory stays small."""
    distances = np.empty(len(queries))
    rows = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _BLOCK):
        block = pairwise(queries[start : start + _BLOCK], references)
        if exclude_self:
            index = np.arange(len(block))
            block[index, index + start] = np.inf
        rows[start : start + len(block)] = block.argmin(axis=1)
        distances[start : start + len(block)] = block.min(axis=1)
    return distances, rows


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
    real_radius = np.sort(pairwise(real, real), axis=1)[:, k]
    synthetic_radius = np.sort(pairwise(synthetic, synthetic), axis=1)[:, k]
    across = pairwise(real, synthetic)
    inside = across < real_radius[:, None]
    return Neighbourhoods(
        precision=float(inside.any(axis=0).mean()),
        recall=float((across < synthetic_radius[None]).any(axis=1).mean()),
        density=float(inside.sum(axis=0).mean() / k),
        coverage=float((across.min(axis=1) < real_radius).mean()),
    )


def auc_interval(positive: Array, negative: Array, confidence_level: float) -> tuple[float, float, float]:
    """AUC that positives score higher, with DeLong's interval (DeLong et al. 1988): (auc, low, high)."""
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    m, n = len(positive), len(negative)
    auc = (ranks[:m].sum() - m * (m + 1) / 2) / (m * n)
    v10 = (ranks[:m] - stats.rankdata(positive)) / n
    v01 = 1 - (ranks[m:] - stats.rankdata(negative)) / m
    stddev = float(np.sqrt(np.var(v10, ddof=1) / m + np.var(v01, ddof=1) / n)) if min(m, n) > 1 else 0.5
    half = float(stats.norm.ppf((1 + confidence_level) / 2)) * stddev
    return float(auc), max(0.0, float(auc) - half), min(1.0, float(auc) + half)


def smallest_detectable_auc(num_training: int, num_control: int, *, false_alarm_rate: float, power: float = 0.8) -> float:
    """AUC that a one-sided rank test finds with the given power, by the normal approximation under the null variance."""
    stddev = np.sqrt((num_training + num_control + 1) / (12 * num_training * num_control))
    return float(0.5 + (stats.norm.ppf(1 - false_alarm_rate) + stats.norm.ppf(power)) * stddev)


def clopper_pearson(successes: int, trials: int, confidence_level: float) -> tuple[float, float]:
    """Exact interval of a rate."""
    if trials == 0:
        return 0.0, 1.0
    tail = (1 - confidence_level) / 2
    low = 0.0 if successes == 0 else float(stats.beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(stats.beta.ppf(1 - tail, successes + 1, trials - successes))
    return low, high
