"""What the membership test says that it would have seen, it sees; without leakage it accuses as often as stated. On scores and points.

An AUC of A is planted as normal scores whose mean is sqrt(2) * ndtri(A) higher for those inside; as many inside as fair coins make.
"""

from __future__ import annotations

import numpy as np
import pytest
from evidence_cases import blank, evidence_of, features_of
from scipy import stats
from scipy.special import ndtri

from dpsynth.checks.evidence import Evidence
from dpsynth.checks.family import decide_family, strictest
from dpsynth.checks.membership import membership, pool_scores
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig

GATE = GateConfig()
FEW, MANY = 40, 200
RARELY = 1e-3  # of a sound check, each count below lies outside its limit


def hospital(pool: int, rng: np.random.Generator) -> Evidence:
    """A pool alone, inside by a fair coin."""
    inside = int(rng.binomial(pool, 0.5))
    return evidence_of(blank(inside), blank(pool - inside, "c"))


def judged(sets: Evidence, scores: np.ndarray, rng: np.random.Generator) -> Verdict:
    return membership(sets, GATE, scores=lambda: scores, rng=rng)


def with_auc(auc: float, inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 1, len(inside)) + np.sqrt(2) * ndtri(auc) * inside


def seen(pool: int, repetitions: int, *, at: float) -> int:
    """How often the AUC that is named as detectable, `at` of its distance from 0.5, is seen at the strictest level of Holm."""
    found = 0
    for seed in range(repetitions):
        rng = np.random.default_rng([pool, seed])
        sets = hospital(pool, rng)
        named = judged(sets, rng.normal(size=pool), rng).figures["smallest detectable AUC"]
        p = judged(sets, with_auc(0.5 + at * (named - 0.5), sets.inside, rng), rng).p_value
        found += p is not None and p <= strictest(GATE)
    return found


def at_least(count: int, trials: int, rate: float) -> bool:
    """Whether a check that truly sees at this rate would have so few only once in a thousand times."""
    return bool(stats.binom.cdf(count, trials, rate) > RARELY)


def test_the_smallest_detectable_auc_is_seen_with_the_power_that_it_names_and_a_smaller_one_is_not() -> None:
    assert at_least(seen(200, FEW, at=1.0), FEW, 0.8)
    assert not at_least(seen(200, FEW, at=0.5), FEW, 0.8)


@pytest.mark.slow
@pytest.mark.parametrize("pool", [100, 200, 400, 1000])
def test_two_hundred_pools_of_each_size_see_the_auc_that_is_named(pool: int) -> None:
    assert at_least(seen(pool, MANY, at=1.0), MANY, 0.8)
    assert not at_least(seen(pool, MANY, at=0.7), MANY, 0.8)


def accusations(repetitions: int) -> tuple[int, int]:
    """At a family of one with p below 0.05, and after Holm, of points that nobody leaked into."""
    alone, failed = 0, 0
    for seed in range(repetitions):
        rng = np.random.default_rng([7, seed])
        sets = hospital(160, rng)
        training, control = rng.normal(size=(sets.training.num_patients, 8)), rng.normal(size=(sets.control.num_patients, 8))
        smoother = 0.6 if seed % 2 else 1.0  # which lies nearer to everybody
        features = features_of(smoother * rng.normal(size=(150, 8)), training, control)
        verdict = decide_family([judged(sets, pool_scores(sets, features), rng)], GATE.family_error)[0]
        alone += verdict.p_value is not None and verdict.p_value <= 0.05
        failed += verdict.outcome is Outcome.FAIL
    return alone, failed


@pytest.mark.parametrize("repetitions", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_without_leakage_it_accuses_as_often_as_stated(repetitions: int) -> None:
    alone, failed = accusations(repetitions)
    assert stats.binom.sf(alone - 1, repetitions, 0.05) > RARELY, alone
    assert stats.binom.sf(failed - 1, repetitions, strictest(GATE)) > RARELY, failed
