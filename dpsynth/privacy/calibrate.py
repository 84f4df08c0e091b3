"""From a budget to mechanisms whose composed epsilon never passes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from scipy.optimize import brentq
from scipy.special import log_ndtr

from dpsynth.errors import ConfigError
from dpsynth.privacy.accountant import FINE, epsilon_pld
from dpsynth.privacy.mechanism import GaussianQuery, Mechanism, MomentRelease, PoissonDpSgd

LARGEST_DELTA = 1e-5
_SMALLEST_NOISE, _LARGEST_NOISE = 0.2, 1e5
_TOLERANCE = 1e-3


def delta_limit(num_patients: int) -> float:
    """Largest delta that may be claimed for so many patients."""
    return min(LARGEST_DELTA, 1 / (10 * num_patients))


def resolve_delta(requested: float | None, num_patients: int) -> float:
    """The delta of a run. Raises ConfigError when the requested one is larger than the limit; it is never rewritten."""
    limit = delta_limit(num_patients)
    if requested is None:
        return limit
    if requested > limit * (1 + 1e-12):
        raise ConfigError(f"privacy.delta: expected at most {limit:.3g} for {num_patients} patients, found {requested:.3g}.")
    return requested


def gaussian_delta(epsilon: float, noise_multiplier: float) -> float:
    """Delta of one Gaussian mechanism at `epsilon` (Balle and Wang 2018, theorem 8), exact."""
    mu = 1 / noise_multiplier
    first = log_ndtr(mu / 2 - epsilon / mu)
    second = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return float(math.exp(first) * -math.expm1(min(second - first, 0.0)))


def gaussian_noise_multiplier(epsilon: float, delta: float) -> float:
    """Noise multiplier at which one Gaussian mechanism is exactly (epsilon, delta)-DP."""

    def excess(log_noise: float) -> float:
        return math.log(max(gaussian_delta(epsilon, math.exp(log_noise)), 1e-300)) - math.log(delta)

    return math.exp(brentq(excess, math.log(0.02), math.log(_LARGEST_NOISE), xtol=1e-12))


def mu_of(epsilon: float, delta: float) -> float:
    """Parameter mu of Gaussian DP that corresponds to (epsilon, delta)."""
    return 1 / gaussian_noise_multiplier(epsilon, delta)


def calibrate_noise(
    make: Callable[[float], Sequence[Mechanism]], *, epsilon: float, delta: float, start: float = 1.0, interval: float = FINE
) -> float:
    """Noise multiplier, within 1 % of the smallest, at which `make(noise)` costs at most `epsilon` at `delta` by PLD.

    Root finding in logarithms on a coarse grid, which rounds epsilon up; then the grid of `interval` has the last word, so the
    result never overshoots. `start` is a first guess. Raises ConfigError when no noise suffices.
    """
    interval = max(interval, 5e-5 * epsilon)  # relative to epsilon this is finer than any digit we print
    search = max(interval, min(3e-3, 5e-4 * epsilon))

    def excess(log_noise: float) -> float:
        value = epsilon_pld(make(math.exp(log_noise)), delta, interval=search)
        return math.log(max(value, 1e-12) / epsilon)

    low = high = math.log(min(max(start, _SMALLEST_NOISE), _LARGEST_NOISE))
    while excess(high) > 0:
        low, high = high, high + 0.25
        if high > math.log(_LARGEST_NOISE):
            raise ConfigError(
                f"privacy.epsilon: no noise brings these steps down to epsilon {epsilon:g}. Take fewer steps or a smaller moments.share."
            )
    while low == high or excess(low) <= 0:  # small noise makes wide distributions, so come from above
        high, low = low, low - 0.25
        if low < math.log(_SMALLEST_NOISE):
            break
    noise = math.exp(brentq(excess, low, high, xtol=1e-3)) if low >= math.log(_SMALLEST_NOISE) else math.exp(high)
    while epsilon_pld(make(noise), delta, interval=interval) > epsilon:
        noise *= 1 + _TOLERANCE
    return noise


def plan_mechanisms(
    *,
    epsilon: float,
    delta: float,
    method: str,
    moments_share: float,
    queries: tuple[GaussianQuery, ...],
    clip_norm: float,
    sampling_probability: float,
    steps: int,
    declared_patients: int,
    interval: float = FINE,
) -> tuple[Mechanism, ...]:
    """The mechanisms of one run within (epsilon, delta): one Gaussian release, and then DP-SGD if it has steps.

    `moments_share` is the part of mu^2 that the moments get when DP-SGD follows.
    """
    total = gaussian_noise_multiplier(epsilon, delta)
    if method == "moments" or steps == 0:
        noise = calibrate_moments(total, queries, epsilon=epsilon, delta=delta)
        return (MomentRelease(noise_multiplier=noise, queries=queries),)
    moments = MomentRelease(noise_multiplier=total / math.sqrt(moments_share), queries=queries)

    def make(noise: float) -> tuple[Mechanism, ...]:
        sgd = PoissonDpSgd(
            noise_multiplier=noise,
            clip_norm=clip_norm,
            sampling_probability=sampling_probability,
            steps=steps,
            declared_patients=declared_patients,
        )
        return (moments, sgd)

    start = _central_limit_noise((1 - moments_share) / total**2, sampling_probability, steps)
    return make(calibrate_noise(make, epsilon=epsilon, delta=delta, start=start, interval=interval))


def _central_limit_noise(mu_squared: float, probability: float, steps: int) -> float:
    """First guess only: mu = q sqrt(T (e^(1/noise^2) - 1)) (Bu et al. 2020, corollary 5.4)."""
    return 1 / math.sqrt(math.log1p(mu_squared / (probability**2 * steps)))


def calibrate_moments(start: float, queries: tuple[GaussianQuery, ...], *, epsilon: float, delta: float) -> float:
    """Smallest noise near the closed form whose PLD, which rounds up, is within `epsilon`."""
    noise = start
    while epsilon_pld((MomentRelease(noise_multiplier=noise, queries=queries),), delta) > epsilon:
        noise *= 1 + 5e-4
    return noise
