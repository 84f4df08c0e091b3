"""When the check of groups cannot tell, and that a leak confined to a crossing of label and attribute is found there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from evidence_cases import evidence_of, features_of, image_set
from scipy import stats
from test_decisions import GATE, points

from dpsynth.checks.evidence import Evidence, Features
from dpsynth.checks.family import decide_family, strictest
from dpsynth.checks.groups import crossings_of, groups, groups_of
from dpsynth.checks.statistics import smallest_detectable_auc
from dpsynth.checks.verdict import Outcome, Verdict


def hospital(pool: int, rng: np.random.Generator) -> tuple[Evidence, Features]:
    """A pool of patients with label and sex, in training by fair coins."""
    people, inside, labels = points(pool, rng, 4), rng.random(pool) < 0.5, rng.integers(0, 2, pool)
    sexes = np.where(rng.random(pool) < 0.5, "F", "M")
    sides = [
        image_set(
            np.zeros((int(rows.sum()), 1, 4, 4)), labels[rows], prefix=prefix, attributes=tuple({"sex": str(sex)} for sex in sexes[rows])
        )
        for rows, prefix in ((inside, "p"), (~inside, "c"))
    ]
    return evidence_of(*sides), features_of(points(50, rng, 4), people[inside], people[~inside])


def judged(sets: Evidence, features: Features, scores: np.ndarray, seed: int = 0) -> Verdict:
    found = groups(sets, features, GATE, scores=lambda: scores, rng=np.random.default_rng(seed))
    return decide_family([found], GATE.family_error)[0]


@pytest.mark.parametrize(
    ("pool", "outcome"), [(30, Outcome.INCONCLUSIVE), (150, Outcome.INCONCLUSIVE), (400, Outcome.PASS)], ids=["none", "some", "most"]
)
def test_it_cannot_tell_when_no_group_could_have_shown_what_the_policy_asks_about(pool: int, outcome: Outcome) -> None:
    rng = np.random.default_rng(0)
    sets, features = hospital(pool, rng)
    verdict = judged(sets, features, rng.normal(size=pool))
    assert verdict.outcome is outcome, verdict.reason
    assert "would have been seen" in verdict.reason
    seen = [value for name, value in verdict.figures.items() if name.startswith("smallest detectable AUC")]
    assert (min(seen) <= GATE.largest_membership_auc) is (outcome is Outcome.PASS)


def test_it_cannot_tell_when_no_group_can_be_tested() -> None:
    rng = np.random.default_rng(0)
    sets, features = hospital(15, rng)
    verdict = judged(sets, features, rng.normal(size=15))
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert verdict.reason.startswith("no group is large enough to be tested; too small to test: ")


def leak(sets: Evidence, rng: np.random.Generator, shift: float) -> np.ndarray:
    """Scores that give away women of class c1 who were trained on, and nobody else."""
    rows = [sets.first_rows[number] for number in sets.pool]
    found = np.array([images.labels[row] == 1 and images.attributes[row]["sex"] == "F" for images, row in rows])
    return rng.normal(size=len(rows)) + shift * (found & sets.inside)


def test_a_leak_in_a_crossing_alone_is_found_and_named_there() -> None:
    """An AUC of 0.69 in a quarter of 1,000 pool patients: power 0.98, fewer than 3 of 4 once in 400."""
    caught = 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        sets, features = hospital(1000, rng)
        verdict = judged(sets, features, leak(sets, rng, 0.7), seed)
        caught += verdict.outcome is Outcome.FLAG and "worst is label c1, sex F" in verdict.reason
    assert caught >= 3, caught


def test_crossings_are_groups_when_they_could_show_what_the_policy_asks_about_and_cost_nothing_else() -> None:
    for pool, wanted in ((400, 0), (1000, 4)):
        sets, features = hospital(pool, np.random.default_rng(1))
        others = groups_of(sets, features)
        found = crossings_of(sets, others, level=strictest(GATE), largest_auc=GATE.largest_membership_auc)
        assert len(found) == wanted
        for rows in found.values():
            half = int(rows.sum()) // 2
            level = strictest(GATE) / (len(others) + 4)
            assert smallest_detectable_auc(half, half, false_alarm_rate=level) <= GATE.largest_membership_auc + 0.001
        assert not np.any([found[name] & found[other] for name in found for other in found if name < other])


def test_a_crossing_that_is_a_whole_label_is_no_second_group() -> None:
    sets, features = hospital(1000, np.random.default_rng(1))
    sides = [
        replace(side, attributes=tuple({"sex": "F" if label else "M"} for label in side.labels)) for side in (sets.training, sets.control)
    ]
    same = replace(sets, training=sides[0], control=sides[1])
    assert crossings_of(same, groups_of(same, features), level=strictest(GATE), largest_auc=0.7) == {}


@pytest.mark.parametrize("repetitions", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_without_a_leak_it_accuses_no_more_often_than_stated(repetitions: int) -> None:
    """p at most 0.05, crossings among the groups: more than that rate allows less than once in 1,000."""
    alarms = 0
    for seed in range(repetitions):
        rng = np.random.default_rng(seed)
        sets, features = hospital(900, rng)
        alarms += judged(sets, features, rng.normal(size=900), seed).figures["p"] <= 0.05
    assert stats.binom.sf(alarms - 1, repetitions, 0.05) > 1e-3, alarms
