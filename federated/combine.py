"""From the sites' noised answers to one: post-processing of what was released, so it costs no privacy. And which answers are usable.

A coordinator trusts a site's answer no further than it can be checked: type, shape, finiteness, a size that follows from public numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from federated.messages import Arrays

Array = NDArray[np.float64]

_ADAM_FACTOR = 2.4  # no Adam step with betas (0.9, 0.99) is longer than this times the learning rate, in any weight: see `largest_update`
_ODD = 3.0  # times the median: an update that much longer or shorter than the others' is left out
_MOST_PATIENTS = 3.0  # times the declared number: noised counts of an honest site do not sum to more
_NOISE = 8.0  # standard deviations: beyond them no honest noise lies in the life of a federation


def counts_problem(counts: Array, *, stddev: float, declared_patients: int) -> str:
    """Why a site's noised counts (classes,) cannot be used; empty when they can."""
    room = _NOISE * stddev
    if counts.min() < -room or counts.sum() > _MOST_PATIENTS * declared_patients + room * math.sqrt(len(counts)):
        return "counts are far below zero, or far above the declared number of patients"
    return ""


def largest_patients(counts: Array, *, stddev: float) -> float:
    """What noised counts (classes,) leave room for: no more patients are at the site."""
    return max(0.0, float(counts.sum())) + _NOISE * stddev * math.sqrt(len(counts))


def sums_problem(sums: Array, *, clip_norm: float, stddev: float, patients: float) -> str:
    """Why a site's noised sums (classes, width) cannot be those of so many patients; empty when they can: each adds a clip norm at most."""
    limit = clip_norm * patients + stddev * (math.sqrt(sums.size) + _NOISE)
    norm = float(np.linalg.norm(sums))
    return "" if norm <= limit else f"its sums are {norm / limit:.3g} times as long as those of its patients can be"


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
