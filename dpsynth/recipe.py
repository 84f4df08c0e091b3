"""How much of the net DP-SGD should train, from public numbers alone: one rule for every data set.

What DP-SGD can learn is bounded by patients times mu over the square root of the weights it trains (the noise of a whole run beside its
signal). Where all weights can be afforded they are trained; where only few can, biases, norms, class embedding and output convolution are;
where not even these can, everything is spent on moments and votes. Chosen on procedural images (experiments/004-public-prior).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from dpsynth.privacy.calibrate import mu_of

Trainable = Literal["all", "small", "none"]

LARGEST_SAMPLING_PROBABILITY = 0.1
_MOST_PATIENTS_PER_STEP = 1000.0  # expected; more would train a large hospital for hours to average what is already clear
LEAST_SIGNAL = 3.0  # patients * mu / sqrt(weights) from which training them gains more than its noise costs
_SMALL_PART = 0.01  # of all weights are in the small set
_WEIGHTS_PER_CHANNEL_PAIR = 137  # of the U-Net: weights by the sum of its squared channels, 3x3 kernels


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """trainable: what DP-SGD trains; draws: of noise for each patient and step; moments_share: part of mu^2 for the moments; what moments
    and votes leave is for DP-SGD."""

    trainable: Trainable
    steps: int
    draws: int
    learning_rate: float
    moments_share: float


FULL = Recipe(trainable="all", steps=80, draws=4, learning_rate=6e-4, moments_share=0.4)
PART = Recipe(trainable="small", steps=40, draws=2, learning_rate=3e-4, moments_share=0.8)
MOMENTS_AND_VOTES = replace(PART, trainable="none", steps=0)


def sampling_probability(declared_patients: int) -> float:
    """Probability of each patient in each step of DP-SGD: a tenth, or less where that is more patients than a step needs."""
    return min(LARGEST_SAMPLING_PROBABILITY, _MOST_PATIENTS_PER_STEP / declared_patients)


def recipe(*, patients: float, epsilon: float, delta: float, channels: tuple[int, ...], dimensions: int, votes_share: float) -> Recipe:
    """The recipe for so many training patients and a U-Net with these channels."""
    weights = _WEIGHTS_PER_CHANNEL_PAIR * sum(channel**2 for channel in channels) * 3 ** (dimensions - 2)
    mu = mu_of(epsilon, delta)
    for candidate, trained in ((FULL, weights), (PART, _SMALL_PART * weights)):
        part = 1 - candidate.moments_share - votes_share
        if part > 0 and patients * mu * math.sqrt(part) >= LEAST_SIGNAL * math.sqrt(trained):
            return candidate
    return MOMENTS_AND_VOTES
