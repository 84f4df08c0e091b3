"""A loss of AUC at the margin passes and fails no more often than stated; a larger one fails, none passes. On scores of known AUC."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from evidence_cases import evidence_of, image_set
from scipy import stats
from scipy.special import ndtr, ndtri

from dpsynth.checks.arms import Arms
from dpsynth.checks.utility import utility
from dpsynth.checks.verdict import Outcome
from dpsynth.config import GateConfig

GATE = GateConfig()
PATIENTS, REAL = 200, 0.90
FEW, MANY = 20, 200
RARELY = 1e-3
STATED = 0.05  # of each limit


def probabilities(own: np.ndarray, labels: np.ndarray, auc: float) -> np.ndarray:
    """Of class 1, of a classifier with this AUC: normal scores, shifted for those who have it."""
    positive = ndtr(own + np.sqrt(2) * ndtri(auc) * labels)
    return np.stack([1 - positive, positive], axis=1)


def outcomes(loss: float, repetitions: int, patients: int = PATIENTS) -> Counter[Outcome]:
    """How often each outcome, of two classifiers that agree with correlation 0.6 and whose true AUCs lie `loss` apart."""
    found: Counter[Outcome] = Counter()
    for seed in range(repetitions):
        rng = np.random.default_rng([round(1000 * loss), seed])
        labels = np.arange(patients) % 2
        shared, one, other = rng.normal(size=(3, patients))
        real = probabilities(0.6**0.5 * shared + 0.4**0.5 * one, labels, REAL)
        ours = probabilities(0.6**0.5 * shared + 0.4**0.5 * other, labels, REAL - loss)
        control = image_set(np.zeros((patients, 1, 4, 4)), labels, prefix="c")
        sets = evidence_of(control=control, synthetic=np.zeros((20, 1, 4, 4)), labels=np.arange(20) % 2)
        arms = Arms(synthetic=ours, real=real, both=real, synthetic_by_real=np.eye(2)[np.arange(20) % 2])
        found[utility(sets, GATE, arms=lambda arms=arms: arms, rng=rng).outcome] += 1  # type: ignore[misc]
    return found


@pytest.mark.parametrize("repetitions", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_loss_at_the_margin_is_failed_and_passed_no_more_often_than_stated(repetitions: int) -> None:
    found = outcomes(GATE.utility_margin, repetitions)
    for outcome in (Outcome.FAIL, Outcome.PASS):
        assert stats.binom.sf(found[outcome] - 1, repetitions, STATED) > RARELY, found


@pytest.mark.parametrize("repetitions", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_loss_of_two_margins_is_failed(repetitions: int) -> None:
    """Power 0.8 or more: fewer than this happen once in a thousand times."""
    assert stats.binom.cdf(outcomes(2 * GATE.utility_margin, repetitions)[Outcome.FAIL], repetitions, 0.8) > RARELY


@pytest.mark.slow
def test_no_loss_is_never_failed_and_enough_patients_pass_it() -> None:
    assert outcomes(0.0, FEW)[Outcome.FAIL] == 0
    assert stats.binom.cdf(outcomes(0.0, FEW, patients=800)[Outcome.PASS], FEW, 0.8) > RARELY
