"""From the sites' noised answers to one: post-processing of what was released, so it costs no privacy. And which answers are usable.

A coordinator trusts a site's answer no further than it can be checked: type, shape, finiteness, a size that follows from public numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dpsynth.model.moments import Moments
from federated.messages import Arrays

Array = NDArray[np.float64]

_ADAM_FACTOR = 2.4  # no Adam step with betas (0.9, 0.99) is longer than this times the learning rate, in any weight: see `largest_update`
_ODD = 3.0  # times the median: an update that much longer or shorter than the others' is left out
_MOST_PATIENTS = 3.0  # times the declared number: noised counts of an honest site do not sum to more


def combined_moments(sites: Sequence[Moments]) -> Moments:
    """Moments of the mixture of the sites' patients: of each class, means weighted by the released noisy counts.

    The covariance is the mean of the sites' covariances and the spread of their means (law of total covariance). A class that a site does
    not have has a noisy count near zero there and so no weight. One site's moments come back as they are.
    """
    shares = _shares(sites)
    mean = np.einsum("sc,scl->cl", shares, np.stack([site.mean for site in sites]))
    covariance = np.zeros_like(sites[0].covariance)
    variance = np.zeros_like(sites[0].variance)
    for share, site in zip(shares, sites, strict=True):
        apart = site.mean - mean
        covariance += share[:, None, None] * (site.covariance + apart[:, :, None] * apart[:, None, :])
        variance += share[:, None] * site.variance
    return Moments(
        shape=sites[0].shape,
        low_frequencies=sites[0].low_frequencies,
        counts=np.sum([site.counts for site in sites], axis=0),
        mean=mean,
        covariance=covariance,
        variance=variance,
    )


def _shares(sites: Sequence[Moments]) -> Array:
    """Of each site in each class, by the released noisy counts (sites, classes)."""
    counts = np.stack([site.counts for site in sites])
    total = counts.sum(axis=0)
    return np.where(total > 0, counts / np.maximum(total, 1e-12), 1 / len(sites))


def moments_problem(moments: Moments, *, declared_patients: int) -> str:
    """Why a site's moments cannot be used; empty when they can."""
    if (moments.counts < 0).any() or moments.counts.sum() > _MOST_PATIENTS * declared_patients:
        return "counts are negative, or far above the declared number of patients"
    if (moments.variance < 0).any():
        return "a variance is negative"
    if not np.allclose(moments.covariance, moments.covariance.swapaxes(1, 2), rtol=1e-6, atol=1e-9):
        return "a covariance is not symmetric"
    if np.linalg.eigvalsh(moments.covariance).min() <= 0:
        return "a covariance is not positive definite"
    return ""


def combined_weights(updates: Mapping[str, Arrays], weights: Mapping[str, float]) -> dict[str, NDArray[np.float32]]:
    """Weighted mean over sites of each array."""
    total = sum(weights[site] for site in updates)
    names = next(iter(updates.values()))
    return {
        name: np.asarray(sum(weights[site] / total * arrays[name].astype(np.float64) for site, arrays in updates.items()), dtype=np.float32)
        for name in names
    }


def update_norm(before: Arrays, after: Arrays) -> float:
    """L2 norm of what a site changed."""
    return math.sqrt(sum(float(np.sum((after[name].astype(np.float64) - before[name]) ** 2)) for name in after))


def largest_update(*, learning_rate: float, steps: int, num_weights: int) -> float:
    """Norm that no honest update passes.

    By Cauchy-Schwarz |m| / sqrt(v) <= (1 - b1) / sqrt(1 - b2) / sqrt(1 - b1^2 / b2) = 2.35, and the bias corrections only shorten it
    (Kingma and Ba 2015, section 2.1, gives the same order).
    """
    return _ADAM_FACTOR * learning_rate * steps * math.sqrt(num_weights) * (1 + 1e-3)


def odd_sites(norms: Mapping[str, float]) -> tuple[str, ...]:
    """Sites whose update is much longer or shorter than the median of all; with fewer than three nobody can say who is odd."""
    if len(norms) < 3:
        return ()
    median = float(np.median(list(norms.values())))
    return tuple(site for site, norm in norms.items() if not median / _ODD <= norm <= median * _ODD)


def averaged(average: Arrays, new: Arrays, *, steps_done: int, steps: int, decay: float) -> dict[str, NDArray[np.float32]]:
    """The running average of the weights after a round, with the decay of `dpsynth.model.ema` once for each step of the round."""
    keep = min(decay, (1 + steps_done) / (10 + steps_done)) ** steps
    return {name: np.asarray(keep * average[name] + (1 - keep) * new[name], dtype=np.float32) for name in new}
