"""Lower bounds on epsilon: known figures, their order, and by simulation that they stay below the truth and rise above a false claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dpsynth.privacy.lower_bounds import (
    Calls,
    clopper_pearson_epsilon,
    gaussian_inverse,
    gdp_epsilon,
    gdp_mu,
    mechanism_inverse,
    one_run_curve_epsilon,
    one_run_curve_p_value,
    one_run_epsilon,
    one_run_p_value,
    pair_inverse,
    rate_upper,
)
from dpsynth.privacy.mechanism import GaussianQuery, MomentRelease

DELTA = 1e-5


def perfect(number: int) -> Calls:
    return Calls(false_positives=0, negatives=number, false_negatives=0, positives=number)


@pytest.mark.parametrize(("number", "bound"), [(20, 1.60), (50, 2.57), (100, 3.28), (200, 3.98), (500, 4.91), (1000, 5.60)])
def test_what_a_perfect_attack_can_prove_by_clopper_pearson(number: int, bound: float) -> None:
    assert clopper_pearson_epsilon(perfect(number), delta=DELTA) == pytest.approx(bound, abs=0.006)


@pytest.mark.parametrize(("number", "bound"), [(20, 1.82), (50, 2.78), (100, 3.49), (200, 4.18)])
def test_what_a_perfect_attack_can_prove_from_one_run(number: int, bound: float) -> None:
    found = one_run_epsilon(cases=2 * number, guesses=number, correct=number, delta=DELTA)
    assert found == pytest.approx(bound, abs=0.006)
    pure = one_run_epsilon(cases=2 * number, guesses=number, correct=number, delta=0)
    assert pure == pytest.approx(-math.log(0.05 ** (-1 / number) - 1), abs=1e-6)  # all right: success^number = 0.05


@pytest.mark.parametrize(("number", "bound"), [(50, 1.94), (100, 2.79), (200, 3.73), (500, 4.42)])
def test_gaussian_dp_bound_at_a_true_mu_of_1_254(number: int, bound: float) -> None:
    errors = round(number * stats.norm.sf(1.254 / 2))
    calls = Calls(false_positives=errors, negatives=number, false_negatives=errors, positives=number)
    assert gdp_epsilon(gdp_mu(calls), DELTA) == pytest.approx(bound, abs=0.01)
    assert gdp_epsilon(1.254, DELTA) == pytest.approx(5.70, abs=0.01)


def test_rates_are_exact_limits() -> None:
    for count, trials in ((0, 10), (3, 20), (19, 20)):
        assert rate_upper(count, trials, 0.05) == pytest.approx(stats.binomtest(count, trials).proportion_ci(0.90, "exact").high)
    assert rate_upper(20, 20, 0.05) == rate_upper(0, 0, 0.05) == 1.0
    assert clopper_pearson_epsilon(Calls(false_positives=0, negatives=0, false_negatives=0, positives=0), delta=0) == 0


def test_more_right_guesses_prove_more_and_a_larger_delta_less() -> None:
    counts = [one_run_epsilon(cases=400, guesses=100, correct=correct, delta=DELTA) for correct in range(40, 101, 5)]
    curves = [one_run_curve_epsilon(cases=400, guesses=100, correct=correct, delta=DELTA) for correct in range(40, 101, 10)]
    deltas = [one_run_epsilon(cases=400, guesses=100, correct=90, delta=delta) for delta in (0, 1e-6, 1e-4, 1e-2)]
    assert counts == sorted(counts)
    assert curves == sorted(curves)
    assert deltas == sorted(deltas, reverse=True)
    assert counts[0] == curves[0] == 0
    assert one_run_p_value(cases=400, guesses=100, correct=0, epsilon=1, delta=DELTA) == 1


def test_without_privacy_loss_the_curve_is_the_binomial_tail() -> None:
    """For epsilon 0 the guesses are fair coins; the recursion may be loose but never below that."""
    for correct in (55, 65, 80):
        p = one_run_curve_p_value(cases=100, guesses=100, correct=correct, inverse=pair_inverse(0.0, 0.0))
        assert p >= stats.binom.sf(correct - 1, 100, 0.5) * (1 - 1e-6)
        assert p < 20 * stats.binom.sf(correct - 1, 100, 0.5)


@pytest.mark.parametrize("epsilon", [0.5, 1.5, 3.0])
def test_the_curve_is_never_below_what_randomized_response_does(epsilon: float) -> None:
    """It is (epsilon, 0)-DP, and its number of right guesses is Binomial(cases, e^eps / (1 + e^eps)): a p-value must dominate that tail."""
    success = math.exp(epsilon) / (1 + math.exp(epsilon))
    for correct in (round(120 * success), min(120, round(120 * success) + 8)):
        tail = stats.binom.sf(correct - 1, 120, success)
        assert one_run_curve_p_value(cases=120, guesses=120, correct=correct, inverse=pair_inverse(epsilon, 0.0)) >= tail * (1 - 1e-6)
        assert one_run_p_value(cases=120, guesses=120, correct=correct, epsilon=epsilon, delta=0) == pytest.approx(tail)


def test_inverses_agree_with_each_other() -> None:
    release = MomentRelease(noise_multiplier=0.8, queries=(GaussianQuery(name="a", share=1.0, clip_norm=1.0),))
    by_accountant, by_formula = mechanism_inverse((release,)), gaussian_inverse(1 / 0.8)
    for y in (0.001, 0.01, 0.1, 0.5, 0.9, 0.999):
        assert by_accountant(y) == pytest.approx(by_formula(y), rel=0.03, abs=1e-6)  # the curve is known at 221 epsilons
        assert by_accountant(y) <= by_formula(y) * (1 + 1e-6)  # and is pessimistic between them
    pair = pair_inverse(1.0, 0.01)
    for x in (0.0, 0.05, 0.3, 0.8):
        reached = min(1.0, 0.01 + math.e * x, 1 - math.exp(-1) * (1 - 0.01 - x))
        assert pair(reached) == pytest.approx(x, abs=1e-12)


def gaussian_run(rng: np.random.Generator, *, mu: float, cases: int) -> tuple[np.ndarray, np.ndarray]:
    inside = rng.random(cases) < 0.5
    return inside, rng.normal(0, 1, cases) + mu * inside


def right_guesses(inside: np.ndarray, scores: np.ndarray, each_side: int) -> int:
    order = np.argsort(-scores)
    return int(inside[order[:each_side]].sum() + (~inside[order[-each_side:]]).sum())


@pytest.mark.parametrize("mu", [0.5, 1.25, 3.0])
def test_bounds_stay_below_the_truth_of_a_gaussian_mechanism(mu: float) -> None:
    """At a failure probability of 5 %, 60 repetitions exceed the truth more than 10 times once in 4,000."""
    rng, truth, repetitions = np.random.default_rng(int(10 * mu)), gdp_epsilon(mu, DELTA), 60
    above = dict.fromkeys(("one run", "curve", "gdp", "counts"), 0)
    for _ in range(repetitions):
        inside, scores = gaussian_run(rng, mu=mu, cases=500)
        guessed = {"cases": 500, "guesses": 100, "correct": right_guesses(inside, scores, 50)}
        above["one run"] += one_run_epsilon(**guessed, delta=DELTA) > truth
        above["curve"] += one_run_curve_p_value(**guessed, inverse=gaussian_inverse(mu)) <= 0.05
        called = scores > mu / 2
        calls = Calls(
            false_positives=int((called & ~inside).sum()),
            negatives=int((~inside).sum()),
            false_negatives=int((~called & inside).sum()),
            positives=int(inside.sum()),
        )
        above["gdp"] += gdp_mu(calls) > mu
        above["counts"] += clopper_pearson_epsilon(calls, delta=DELTA) > truth
    assert max(above.values()) <= 10, above


def test_a_mechanism_with_half_the_noise_it_claims_is_refuted() -> None:
    """Claimed mu 1, true mu 2, at a failure probability of 1 %; the same guesses never refute a true mu of 1."""
    rng, refuted = np.random.default_rng(0), {1.0: 0, 2.0: 0}
    for mu in refuted:
        for _ in range(10):
            inside, scores = gaussian_run(rng, mu=mu, cases=2000)
            correct = right_guesses(inside, scores, 150)
            refuted[mu] += one_run_curve_p_value(cases=2000, guesses=300, correct=correct, inverse=gaussian_inverse(1.0)) <= 0.01
    assert refuted[1.0] == 0
    assert refuted[2.0] >= 9


def test_the_curve_proves_more_than_one_pair() -> None:
    rng = np.random.default_rng(1)
    inside, scores = gaussian_run(rng, mu=2.0, cases=1000)
    guessed = {"cases": 1000, "guesses": 500, "correct": right_guesses(inside, scores, 250), "delta": DELTA}
    assert one_run_curve_epsilon(**guessed) > one_run_epsilon(**guessed)
