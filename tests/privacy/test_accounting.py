"""Accountants against published values, closed forms and each other; calibration never overshoots."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from dpsynth.errors import ConfigError
from dpsynth.privacy.accountant import Accounting, account, delta_curve, epsilon_pld, epsilon_rdp, tpr_at_fpr
from dpsynth.privacy.calibrate import (
    calibrate_noise,
    delta_limit,
    gaussian_delta,
    gaussian_noise_multiplier,
    plan_mechanisms,
    resolve_delta,
)
from dpsynth.privacy.mechanism import GaussianQuery, Mechanism, MomentRelease, NonPrivate, PoissonDpSgd, from_json, to_json
from dpsynth.train.second_opinion import prv_epsilon

QUERIES = (GaussianQuery(name="a", share=0.25, clip_norm=2.0), GaussianQuery(name="b", share=0.75, clip_norm=5.0))


def sgd(noise: float, probability: float, steps: int) -> PoissonDpSgd:
    return PoissonDpSgd(noise_multiplier=noise, clip_norm=1.0, sampling_probability=probability, steps=steps, declared_patients=1000)


def moments(noise: float) -> MomentRelease:
    return MomentRelease(noise_multiplier=noise, queries=QUERIES)


# Computed with dp-accounting 0.6.0 and Opacus 1.6.0 by their own interfaces; RDP with the library's default orders.
GOLDEN = [
    (sgd(1.5, 0.04, 2250), 1e-5, 6.769, 6.779, 7.329),
    (sgd(3.0, 0.1, 512), 1e-6, 3.770, 3.780, 4.051),
    (sgd(1.2, 0.032, 1500), 1e-5, 5.904, None, 6.433),
]


@pytest.mark.parametrize(("mechanism", "delta", "pld", "prv", "rdp"), GOLDEN)
def test_golden_epsilons(mechanism: PoissonDpSgd, delta: float, pld: float, prv: float | None, rdp: float) -> None:
    assert epsilon_pld([mechanism], delta) == pytest.approx(pld, abs=1e-3)
    assert epsilon_rdp([mechanism], delta) == pytest.approx(rdp, abs=1e-3)
    if prv is not None:
        assert prv_epsilon([mechanism], delta) == pytest.approx(prv, abs=1e-3)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-7])
def test_one_gaussian_matches_the_closed_form(epsilon: float, delta: float) -> None:
    noise = gaussian_noise_multiplier(epsilon, delta)
    mu = 1 / noise
    exact = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    assert exact == pytest.approx(delta, rel=1e-6)
    assert gaussian_delta(epsilon, noise) == pytest.approx(exact, rel=1e-6)
    assert epsilon_pld([moments(noise)], delta) == pytest.approx(epsilon, rel=2e-3)
    full_batch = sgd(noise * math.sqrt(50), 1.0, 50)  # fifty Gaussians of mu/sqrt(50)
    assert epsilon_pld([full_batch], delta) == pytest.approx(epsilon, rel=5e-3)


def test_queries_of_a_release_compose_to_its_noise_multiplier() -> None:
    from dp_accounting.pld import PLDAccountant

    release = moments(0.8)
    composed = PLDAccountant(value_discretization_interval=1e-4).compose(release.event()).get_epsilon(1e-5)
    assert epsilon_pld([release], 1e-5) == pytest.approx(composed, rel=1e-3)


def test_the_event_and_the_distribution_agree_for_dp_sgd() -> None:
    from dp_accounting.pld import PLDAccountant

    mechanism = sgd(1.1, 0.07, 90)
    composed = PLDAccountant(value_discretization_interval=1e-4).compose(mechanism.event()).get_epsilon(1e-5)
    assert epsilon_pld([mechanism], 1e-5) == pytest.approx(composed, rel=1e-4)


def test_attack_rates_match_the_gaussian_trade_off() -> None:
    mu = 1 / 0.8
    fprs = np.array([0.001, 0.01, 0.1, 0.5])
    expected = norm.cdf(norm.ppf(fprs) + mu)  # Dong, Roth, Su 2022, equation 6
    assert tpr_at_fpr([moments(0.8)], fprs.tolist()) == pytest.approx(expected, abs=5e-3)
    assert (tpr_at_fpr([moments(0.8)], fprs.tolist()) >= expected - 1e-4).all()


def test_attack_rates_of_no_privacy_and_of_no_touch() -> None:
    assert tpr_at_fpr([NonPrivate(reason="x")], [0.01]).tolist() == [1.0]
    assert tpr_at_fpr([], [0.01]) == pytest.approx([0.01], abs=1e-9)


def test_nothing_costs_nothing_and_non_private_costs_everything() -> None:
    assert epsilon_pld([], 1e-5) == 0
    assert epsilon_pld([sgd(1.0, 0.1, 0)], 1e-5) == 0
    for accountant in (epsilon_pld, epsilon_rdp, prv_epsilon):
        assert accountant([sgd(1.0, 0.1, 10), NonPrivate(reason="x")], 1e-5) == math.inf
    assert delta_curve([NonPrivate(reason="x")], [1.0]).tolist() == [1.0]


@settings(max_examples=8, deadline=None)
@given(noise=st.floats(0.6, 5), probability=st.floats(0.01, 0.9), steps=st.integers(1, 400))
def test_the_second_opinion_agrees_and_rdp_bounds(noise: float, probability: float, steps: int) -> None:
    mechanisms: list[Mechanism] = [moments(2.0), sgd(noise, probability, steps)]
    accounting = account(mechanisms, 1e-5, second_opinion=prv_epsilon)
    if accounting.pld < 30:
        assert accounting.problems() == ()
        assert accounting.rdp >= accounting.pld


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"second_opinion": None}, "no number"),
        ({"second_opinion": 5.2}, "2 %"),
        ({"rdp": 4.5}, "bound"),
        ({"pld": math.inf}, "infinite"),
    ],
)
def test_a_disagreement_is_named(change: dict[str, float | None], word: str) -> None:
    good = {"delta": 1e-5, "pld": 5.0, "rdp": 5.4, "second_opinion": 5.05, "second_opinion_name": "other"}
    assert Accounting(**good).problems() == ()  # type: ignore[arg-type]
    assert any(word in problem for problem in Accounting(**{**good, **change}).problems())  # type: ignore[arg-type]


@settings(max_examples=8, deadline=None)
@given(
    epsilon=st.floats(0.2, 20),
    share=st.floats(0.05, 0.95),
    probability=st.floats(0.01, 1.0),
    steps=st.integers(1, 500),
    method=st.sampled_from(["moments", "diffusion"]),
)
def test_planned_mechanisms_never_overshoot_and_waste_little(
    epsilon: float, share: float, probability: float, steps: int, method: str
) -> None:
    mechanisms = plan_mechanisms(
        epsilon=epsilon, delta=1e-5, method=method, moments_share=share, queries=QUERIES, clip_norm=1.0,
        sampling_probability=probability, steps=steps, declared_patients=500,
    )  # fmt: skip
    spent = epsilon_pld(mechanisms, 1e-5)
    assert spent <= epsilon
    if mechanisms[-1].kind == "moment_release" or mechanisms[-1].noise_multiplier > 0.21:  # type: ignore[union-attr]
        assert spent >= 0.97 * epsilon


def test_an_impossible_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="no noise"):
        calibrate_noise(lambda noise: [moments(0.5), sgd(noise, 0.1, 10)], epsilon=1.0, delta=1e-5)


@pytest.mark.parametrize(("patients", "limit"), [(1, 1e-5), (10_000, 1e-5), (10_001, 1 / 100_010), (1_000_000, 1e-7)])
def test_delta_is_limited_by_the_patients(patients: int, limit: float) -> None:
    assert delta_limit(patients) == pytest.approx(limit)
    assert resolve_delta(None, patients) == pytest.approx(limit)
    assert resolve_delta(limit / 2, patients) == limit / 2
    with pytest.raises(ConfigError, match="delta"):
        resolve_delta(limit * 1.01, patients)


@pytest.mark.parametrize("mechanism", [moments(1.5), sgd(1.2, 0.1, 20), NonPrivate(reason="because")])
def test_mechanisms_survive_json(mechanism: Mechanism) -> None:
    import json

    assert from_json(json.loads(json.dumps(to_json(mechanism)))) == mechanism


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.nan},
        {"clip_norm": -1.0},
        {"sampling_probability": 1.5},
        {"steps": -1},
    ],
)
def test_a_mechanism_that_means_nothing_cannot_be_made(change: dict[str, float]) -> None:
    good = {"noise_multiplier": 1.0, "clip_norm": 1.0, "sampling_probability": 0.1, "steps": 3, "declared_patients": 10}
    with pytest.raises(ValueError, match="Expected"):
        PoissonDpSgd(**{**good, **change})  # type: ignore[arg-type]
