"""What the test of attributes says that it would have seen, it sees, by the attribute that tells; an AUC planted in the scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from evidence_cases import evidence_of, features_of, image_set
from scipy import stats
from scipy.special import ndtri

from dpsynth.checks import attributes as module
from dpsynth.checks.attributes import LABEL, Guesses, attributes
from dpsynth.checks.evidence import Evidence
from dpsynth.checks.family import ALONE, decide_family
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig

GATE = GateConfig()
POOL, IMAGES = 160, 100
FEW, MANY = 40, 200
RARELY = 1e-3
SECRETS = (LABEL, "sex")


def hospital(rng: np.random.Generator) -> Evidence:
    """A pool alone, inside by fair coins; sexes and labels by coins, of patients and images."""
    inside = rng.random(POOL) < 0.5
    sides = []
    for side, prefix in ((inside, "t"), (~inside, "c")):
        count = int(side.sum())
        values = tuple({"sex": sex} for sex in rng.choice(["F", "M"], count))
        sides.append(image_set(np.zeros((count, 1, 4, 4)), rng.integers(0, 2, count), prefix=prefix, attributes=values))
    drawn = evidence_of(*sides, np.zeros((IMAGES, 1, 4, 4)), rng.integers(0, 2, IMAGES))
    return replace(drawn, synthetic_attributes={"sex": rng.choice(["F", "M"], IMAGES)})


def judged(sets: Evidence, scores: dict[str, np.ndarray], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Verdict:
    """The verdict on these scores in place of those of images."""
    right = {name: rng.random(POOL) < 0.5 for name in scores}
    monkeypatch.setattr(module, "guesses", lambda *_: Guesses(scores=scores, right=right))
    nothing = features_of(np.zeros((2, 1)), np.zeros((sets.training.num_patients, 1)), np.zeros((sets.control.num_patients, 1)))
    return decide_family([attributes(sets, nothing, GATE, rng=rng)], GATE.family_error)[0]


def seen(repetitions: int, monkeypatch: pytest.MonkeyPatch, *, at: float) -> int:
    """How often the AUC that is named, `at` of its distance from 0.5, planted for the sex alone, is flagged by that name."""
    found = 0
    for seed in range(repetitions):
        rng = np.random.default_rng([17, seed])
        sets = hospital(rng)
        scores = {name: rng.normal(size=POOL) for name in SECRETS}
        named = judged(sets, scores, rng, monkeypatch).figures["smallest detectable AUC"]
        scores = {name: rng.normal(size=POOL) for name in SECRETS}
        scores["sex"] += np.sqrt(2) * ndtri(0.5 + at * (named - 0.5)) * sets.inside
        verdict = judged(sets, scores, rng, monkeypatch)
        found += verdict.outcome is Outcome.FLAG and "most for sex" in verdict.reason
    return found


@pytest.mark.parametrize("repetitions", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_the_auc_that_is_named_is_seen_and_a_smaller_one_is_not(repetitions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than this happen once in a thousand times at power 0.8; at half of the distance they do not reach it."""
    assert stats.binom.cdf(seen(repetitions, monkeypatch, at=1.0), repetitions, 0.8) > RARELY
    assert stats.binom.cdf(seen(repetitions, monkeypatch, at=0.5), repetitions, 0.8) < RARELY


@pytest.mark.parametrize("repetitions", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_scores_that_tell_nothing_are_flagged_as_often_as_stated(repetitions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when both scores are the same, as those of two attributes that go together."""
    flagged, small = 0, 0
    for seed in range(repetitions):
        rng = np.random.default_rng([19, seed])
        sets, own = hospital(rng), rng.normal(size=(2, POOL))
        verdict = judged(sets, {LABEL: own[0], "sex": own[seed % 2]}, rng, monkeypatch)
        flagged += verdict.outcome is Outcome.FLAG
        small += verdict.p_value is not None and verdict.p_value <= 0.05
    assert stats.binom.sf(flagged - 1, repetitions, ALONE) > RARELY, flagged
    assert stats.binom.sf(small - 1, repetitions, 0.05) > RARELY, small
