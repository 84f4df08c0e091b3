"""From the outcome of an attack to an epsilon that the mechanism cannot be below, except with a stated failure probability.

Every function is pure. A bound says what an attack has shown; a low one is no evidence of privacy, as it can be no higher than the number
of cases allows: 100 guesses, all right, prove epsilon 3.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats
from scipy.special import expit, ndtr, ndtri

from dpsynth.privacy.accountant import delta_curve
from dpsynth.privacy.calibrate import gaussian_delta
from dpsynth.privacy.mechanism import Mechanism

FAILURE = 0.05
_LARGEST_EPSILON, _LARGEST_MU = 60.0, 40.0

InverseBlowUp = Callable[[float], float]
"""y to the smallest x from which a mechanism can make y: x such that 1 - f(x) = y for the trade-off function f."""


@dataclass(frozen=True, kw_only=True)
class Calls:
    """How an attack called cases: `false_positives` of `negatives` that were out, `false_negatives` of `positives` that were in."""

    false_positives: int
    negatives: int
    false_negatives: int
    positives: int

    def upper_rates(self, failure: float) -> tuple[float, float]:
        """Upper limits of false positive and false negative rate that hold together (Bonferroni)."""
        return (
            rate_upper(self.false_positives, self.negatives, failure / 2),
            rate_upper(self.false_negatives, self.positives, failure / 2),
        )


def rate_upper(count: int, trials: int, failure: float) -> float:
    """One-sided upper limit of a rate (Clopper and Pearson 1934); 1 when all or none were tried."""
    return 1.0 if count >= trials else float(stats.beta.ppf(1 - failure, count + 1, trials - count))


def clopper_pearson_epsilon(calls: Calls, *, delta: float, failure: float = FAILURE) -> float:
    """Lower bound from both error rates (Nasr et al. 2021, arXiv 2101.04535). The threshold must come from other cases."""
    fpr, fnr = calls.upper_rates(failure)
    found = [math.log((1 - high - delta) / low) for high, low in ((fnr, fpr), (fpr, fnr)) if 1 - high - delta > 0]
    return max(0.0, *found) if found else 0.0


def gdp_mu(calls: Calls, *, failure: float = FAILURE) -> float:
    """Lower bound on mu of a mechanism that is close to Gaussian DP (Nasr et al. 2023, arXiv 2302.07956); says nothing of others."""
    fpr, fnr = calls.upper_rates(failure)
    return 0.0 if fpr >= 1 or fnr >= 1 else max(0.0, float(-ndtri(fpr) - ndtri(fnr)))


def gdp_epsilon(mu: float, delta: float) -> float:
    """Epsilon of mu-Gaussian DP at delta (Dong, Roth, Su 2022, corollary 2.13)."""
    if mu <= 0 or gaussian_delta(0.0, 1 / mu) <= delta:
        return 0.0
    return float(optimize.brentq(lambda epsilon: gaussian_delta(epsilon, 1 / mu) - delta, 0.0, mu * mu / 2 + 10 * mu))


def one_run_p_value(*, cases: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """p-value of "the mechanism is (epsilon, delta)-DP" from one run (Steinke et al. 2023, arXiv 2305.08846, theorem 5.2).

    Each case was in by its own fair coin; `guesses` of them were called, in or out, the others abstained from. Which ones may depend on
    the scores, how many may not.
    """
    success = float(expit(epsilon))
    tail = float(stats.binom.sf(correct - 1, guesses, success))
    if delta == 0 or correct == 0:
        return tail
    i = np.arange(1, correct + 1)
    slope = float(np.max((stats.binom.sf(correct - i - 1, guesses, success) - tail) / i))
    return min(1.0, tail + 2 * cases * delta * max(0.0, slope))


def one_run_epsilon(*, cases: int, guesses: int, correct: int, delta: float, failure: float = FAILURE) -> float:
    """Largest epsilon that the outcome refutes; 0 when none."""
    return _largest_refuted(
        lambda epsilon: one_run_p_value(cases=cases, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta),
        failure,
        _LARGEST_EPSILON,
    )


def one_run_curve_p_value(*, cases: int, guesses: int, correct: int, inverse: InverseBlowUp) -> float:
    """p-value of "the mechanism's trade-off function is at least f" from one run (Mahloujifar et al. 2024, arXiv 2410.22235, algorithm 3).

    Tighter than a single (epsilon, delta). It is the largest probability of at least `correct` right guesses that the recursion allows.
    """
    if correct <= 0:
        return 1.0
    if _curve_allows(1.0, cases, guesses, correct, inverse):
        return 1.0
    low, high = -700.0, 0.0  # logarithm of the probability
    for _ in range(26):
        middle = (low + high) / 2
        low, high = (middle, high) if _curve_allows(math.exp(middle), cases, guesses, correct, inverse) else (low, middle)
    return math.exp(high)


def one_run_curve_refutes(*, cases: int, guesses: int, correct: int, inverse: InverseBlowUp, failure: float) -> bool:
    """Whether that p-value is below `failure`, without finding it: a millisecond instead of a second."""
    return correct > 0 and not _curve_allows(failure, cases, guesses, correct, inverse)


def one_run_curve_epsilon(*, cases: int, guesses: int, correct: int, delta: float, failure: float = FAILURE) -> float:
    """Largest epsilon at `delta` of the Gaussian trade-off functions that the outcome refutes; for mechanisms close to Gaussian DP."""

    def p_value(mu: float) -> float:
        return one_run_curve_p_value(cases=cases, guesses=guesses, correct=correct, inverse=gaussian_inverse(mu))

    return gdp_epsilon(_largest_refuted(p_value, failure, _LARGEST_MU), delta)


def _curve_allows(probability: float, cases: int, guesses: int, correct: int, inverse: InverseBlowUp) -> bool:
    """Whether "at least `correct` right" may have this probability. right, wrong: the mass of right and wrong guesses in that event."""
    right, wrong = probability * correct / cases, probability * (guesses - correct) / cases
    limit = guesses / cases * (1 + 1e-12)
    for i in range(correct - 1, -1, -1):
        needed = max(wrong, inverse(right))
        right, wrong = right + i / (guesses - i) * (needed - wrong), needed
        if right + wrong > limit:
            return False
    return True


def gaussian_inverse(mu: float) -> InverseBlowUp:
    """Of mu-Gaussian DP, whose trade-off function is Phi(Phi^-1(1 - x) - mu)."""
    return lambda y: float(ndtr(ndtri(min(y, 1.0)) - mu))


def pair_inverse(epsilon: float, delta: float) -> InverseBlowUp:
    """Of (epsilon, delta)-DP."""
    return lambda y: max(0.0, (y - delta) * math.exp(-epsilon), 1 - delta - math.exp(epsilon) * (1 - y))


@lru_cache(maxsize=16)
def mechanism_inverse(mechanisms: tuple[Mechanism, ...]) -> InverseBlowUp:
    """Of what the accountant says of these mechanisms, from their whole delta(epsilon) curve; it assumes nothing about their shape."""
    epsilons = np.concatenate([np.linspace(0, 5, 101), np.linspace(5.2, 60, 120)])
    deltas = delta_curve(mechanisms, epsilons.tolist())
    growth: NDArray[np.float64] = np.exp(epsilons)

    def inverse(y: float) -> float:
        return max(0.0, float(np.max((y - deltas) / growth)), float(np.max(1 - deltas - growth * (1 - y))))

    return inverse


def _largest_refuted(p_value: Callable[[float], float], failure: float, largest: float) -> float:
    """The p-value grows with its argument: the largest argument at which it is at most `failure`."""
    if p_value(0.0) > failure:
        return 0.0
    low, high = 0.0, largest
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle) <= failure else (low, middle)
    return low
