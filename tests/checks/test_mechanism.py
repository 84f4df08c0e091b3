"""What the check of the mechanism says of its own sight, and that it says nothing of sight where there is nothing to see."""

from __future__ import annotations

import json

import numpy as np
import pytest
from evidence_cases import evidence_of
from test_decisions import GATE

from dpsynth.checks.family import decide_family, strictest
from dpsynth.checks.mechanism import mechanism, power_at_half_noise
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.privacy.audit import BEFORE, DURING, Audit, outcome
from dpsynth.privacy.mechanism import PoissonDpSgd

LEVEL = strictest(GATE) / 2


def dp_sgd(noise: float, chance: float, steps: int) -> PoissonDpSgd:
    return PoissonDpSgd(noise_multiplier=noise, clip_norm=1.0, sampling_probability=chance, steps=steps, declared_patients=3000)


TOY, OWN = dp_sgd(3.5, 0.9, 8), dp_sgd(1.5, 0.05, 20)


def audited(sgd: PoissonDpSgd, canaries: int, seed: int, *, noise: float = 1.0) -> Audit:
    """Scores as training would make them, with a part of the noise."""
    rng = np.random.default_rng(seed)
    inside = rng.random(canaries) < 0.5
    scores = rng.normal(0, noise * sgd.noise_multiplier * np.sqrt(sgd.steps), canaries)
    return outcome(scores + inside * rng.binomial(sgd.steps, sgd.sampling_probability, canaries), inside, sgd)


@pytest.mark.parametrize(("sgd", "canaries"), [(TOY, 3000), (dp_sgd(5.0, 0.5, 20), 1000), (OWN, 1000)], ids=["seen", "seldom", "never"])
def test_the_stated_power_is_what_happens_with_half_of_the_noise(sgd: PoissonDpSgd, canaries: int) -> None:
    """Refused in a share of 100 simulated runs that lies within 0.15 of the stated power (three standard errors of a half)."""
    runs = [audited(sgd, canaries, seed, noise=0.5) for seed in range(100)]
    stated = power_at_half_noise(runs[0], LEVEL)
    assert abs(np.mean([run.refuted(LEVEL) for run in runs]) - stated) < 0.15
    assert power_at_half_noise(runs[0], LEVEL / 100) <= stated


def test_its_power_is_that_of_this_run_and_survives_an_accusation() -> None:
    for noise, wanted in ((1.0, Outcome.PASS), (0.25, Outcome.FAIL)):
        audits = {BEFORE: audited(TOY, 3000, 0, noise=noise), DURING: audited(OWN, 1000, 0)}
        canaries = {name: audit.to_json() for name, audit in audits.items()}
        verdict = decide_family([mechanism(evidence_of(canaries=canaries), GATE)], GATE.family_error)[0]
        assert verdict.outcome is wanted, verdict.reason
        assert "half of the noise would have been seen with probability 0.92 before training, on a toy net" in verdict.reason
        assert "and 0.01 during training, with this run's own noise and steps" in verdict.reason
        assert verdict.figures[f"power to see half of the noise, {DURING}"] == power_at_half_noise(audits[DURING], LEVEL)


def test_canaries_of_a_mechanism_that_costs_more_than_the_run_claims_fail() -> None:
    """They name their mechanism themselves: an audit of little noise, rightly guessed, refutes nothing about that mechanism."""
    careless = dp_sgd(0.4, 0.5, 20)
    audits = {BEFORE: audited(TOY, 3000, 0), DURING: audited(careless, 1000, 0)}
    canaries = {name: audit.to_json() for name, audit in audits.items()}
    verdict = decide_family([mechanism(evidence_of(canaries=canaries), GATE)], GATE.family_error)[0]
    assert verdict.outcome is Outcome.FAIL
    assert "above the 8.00 of the whole run" in verdict.reason


def test_without_dp_sgd_it_says_that_there_was_nothing_to_test() -> None:
    verdict = decide_family([mechanism(evidence_of(uses_sgd=False), GATE)], GATE.family_error)[0]
    assert verdict.outcome is Outcome.PASS
    assert not verdict.tested
    assert verdict.reason == (
        "nothing was trained by DP-SGD, so canaries have nothing to test; the noise of the moments is tested in accounting"
    )
    assert (verdict.false_alarm_rate, verdict.lower_bound, verdict.figures) == (0.0, None, {})
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict
    assert verdict.to_public_json()["tested"] is False
