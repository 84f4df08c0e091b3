"""What makes the checks' error rates true: exact nulls, corrections for several tests, limits at their place, no number that leaves."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases import verdict
from evidence_cases import evidence_of, features_of, image_set
from scipy import stats
from test_decisions import GATE, Hospital, points

import dpsynth.checks.copying as copying_module
import dpsynth.checks.fidelity as fidelity_module
import dpsynth.checks.groups as groups_module
import dpsynth.checks.mechanism as mechanism_module
from dpsynth.checks import suite
from dpsynth.checks.accounting import accounting
from dpsynth.checks.copying import SCREENED, copying, usual_ratios, visible
from dpsynth.checks.encoders import bundled
from dpsynth.checks.evidence import Evidence, compute_features
from dpsynth.checks.groups import groups
from dpsynth.checks.mechanism import mechanism
from dpsynth.checks.membership import Attack, attack
from dpsynth.checks.search import Approaches, approaches
from dpsynth.checks.statistics import coin_flip_count_p, coin_flip_p, share_interval
from dpsynth.checks.verdict import Outcome
from dpsynth.privacy.audit import BEFORE, DURING
from dpsynth.progress import silent

FLIPS = 4000


def every_coin(patients: int) -> np.ndarray:
    return np.array(list(itertools.product([False, True], repeat=patients)))


def agrees(estimate: float, exact: float) -> bool:
    return abs(estimate - exact) < 5 * math.sqrt(exact * (1 - exact) / FLIPS) + 2 / FLIPS


@pytest.mark.parametrize("seed", range(6))
def test_the_count_over_several_sets_is_exact_by_enumeration(seed: int) -> None:
    """The largest excess over all sets against the largest over all sets; against that of one set it would accuse too often."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(10)
    nested = np.array([order < size for size in (3, 5, 8)])
    coins, inside = every_coin(10), rng.random(10) < 0.6
    excess = lambda rows: ((2 * rows.astype(float) - 1) @ nested.T / np.sqrt(nested.sum(axis=1))).max(axis=-1)  # noqa: E731
    exact = float(np.mean(excess(coins) >= excess(inside) - 1e-9))
    p, telling = coin_flip_count_p(nested, inside, rng=rng, flips=FLIPS)
    assert agrees(p, exact), (p, exact)
    assert telling == int(((2 * inside.astype(float) - 1) @ nested.T / np.sqrt(nested.sum(axis=1))).argmax())


@pytest.mark.parametrize("seed", range(6))
def test_the_rank_test_is_exact_by_enumeration_and_never_certain(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, inside = rng.normal(size=10), rng.random(10) < 0.4
    ranks = scores.argsort().argsort() - 4.5
    exact = float(np.mean(every_coin(10) @ ranks >= inside @ ranks - 1e-9))
    assert agrees(coin_flip_p(scores, inside, rng=rng, flips=FLIPS), exact)
    assert coin_flip_p(np.arange(60.0), np.arange(60) >= 30, rng=rng, flips=99) == 1 / 100


def test_more_flips_follow_only_where_few_reach_and_the_test_stays_exact() -> None:
    telling = np.arange(60) >= 30
    assert coin_flip_p(np.arange(60.0), telling, rng=np.random.default_rng(0), flips=99, level=0.01) == 1 / 2001
    assert round(1 / (coin_flip_p(np.zeros(60), telling, rng=np.random.default_rng(0), flips=99, level=0.01))) == 1
    rng, found = np.random.default_rng(1), []
    for _ in range(2000):
        scores, inside = rng.normal(size=40), rng.random(40) < 0.5
        found.append(coin_flip_p(scores, inside, rng=rng, flips=99, level=0.01))
    assert all(round(100 * p, 9) == round(100 * p) for p in found if p > 0.25), "those whom nothing speaks against cost no more flips"
    for level in (0.002, 0.01, 0.05, 0.2):
        assert stats.binom.sf(sum(p <= level for p in found) - 1, len(found), level) > 1e-3


def test_equal_scores_prove_no_epsilon_in_whatever_order_patients_are_listed() -> None:
    found = [attack(np.zeros(400), np.arange(400) < 200, delta=1e-5, level=0.0125, rng=np.random.default_rng(s)) for s in range(20)]
    assert all(one.p == 1 for one in found)
    assert np.mean([one.epsilon for one in found]) < 0.2
    assert np.mean([one.correct / one.guesses for one in found]) == pytest.approx(0.5, abs=0.1)


def test_the_worst_of_several_groups_pays_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    hospital = Hospital.drawn(rng)
    asked: list[float] = []

    def constant(scores: np.ndarray, inside: np.ndarray, *, level: float, **_: Any) -> Attack:
        asked.append(level)
        return Attack(p=0.004, auc=0.6, low=0.5, high=0.7, epsilon=0.0, guesses=1, correct=1, detectable=0.6)

    monkeypatch.setattr(groups_module, "attack", constant)
    sets = hospital.sets(tuple({"sex": "FM"[row % 2]} for row in range(len(hospital.training))))
    found = groups(sets, hospital.features(points(80, rng)), GATE, scores=lambda: rng.normal(size=len(sets.pool)), rng=rng)
    assert len(asked) >= 2
    assert found.p_value == pytest.approx(0.004 * len(asked))
    assert asked == pytest.approx([GATE.family_error / 4 / len(asked)] * len(asked))


def test_the_worse_of_two_audits_pays_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {BEFORE: 0.3, DURING: 0.01}

    def audit(name: str) -> SimpleNamespace:
        bounds = {mechanism_module.HEADLINE: 0.0}
        return SimpleNamespace(p_value=lambda: values[name], lower_bounds=lambda _: bounds, claimed=lambda _: 1.0, guesses=1, correct=1)

    monkeypatch.setattr(mechanism_module, "Audit", SimpleNamespace(from_json=audit))
    monkeypatch.setattr(mechanism_module, "power_at_half_noise", lambda _, level: level)
    found = mechanism(evidence_of(canaries={BEFORE: BEFORE, DURING: DURING}), GATE)
    assert found.p_value == pytest.approx(0.02)
    assert "with probability 0.01 before" in found.reason  # each is asked at half of its share of the family error: 0.05 / 4 / 2


def test_a_finding_that_does_not_say_ok_is_no_finding() -> None:
    evidence = evidence_of()
    for name in evidence.selfcheck:
        assert accounting(replace(evidence, selfcheck={**evidence.selfcheck, name: {"detail": "?"}})).outcome is not Outcome.PASS, name


def test_a_statistic_that_is_no_number_is_no_answer() -> None:
    for name in ("statistic", "threshold"):
        assert suite._guarded("x", lambda name=name: replace(verdict("x"), **{name: math.nan})).outcome is Outcome.INCONCLUSIVE
    assert suite._guarded("x", lambda: verdict("x")).outcome is Outcome.PASS


def test_what_leaves_of_a_verdict_on_patients_is_a_fixed_list() -> None:
    full = replace(verdict("membership"), accusation="AUC 0.7", listed=((1, "p"),), p_value=0.1, lower_bound=1.0)
    assert set(full.to_public_json()) == {"check", "question", "outcome", "limitation", "false_alarm_rate", "family", "public", "tested"}


def with_ratios(synthetic: list[float]) -> tuple[Evidence, Any]:
    """80 pool patients who all come to each other with a ratio of 0.8, and synthetic images that come so near to the first ones."""
    rng = np.random.default_rng(0)
    evidence = evidence_of(image_set(np.zeros((40, 1, 4, 4)), np.zeros(40)), image_set(np.zeros((40, 1, 4, 4)), np.zeros(40), prefix="c"))
    evidence = replace(evidence, synthetic=np.zeros((len(synthetic), 1, 4, 4), np.float32))

    def approached(ratios: list[float]) -> Approaches:
        number = np.arange(len(ratios))
        return Approaches(item=number, patient=number, ratio=np.array(ratios), copy=np.full(len(ratios), 0.02), kind=number * 0)

    features = features_of(points(len(synthetic), rng), points(40, rng), points(40, rng))
    return evidence, replace(features, synthetic_approaches=approached(synthetic), real_approaches=approached([0.8] * 80))


def test_the_screening_begins_where_it_is_said_to() -> None:
    assert SCREENED == 0.6
    evidence, features = with_ratios([0.8 * 0.59, 0.8 * 0.61, 0.8 * 0.3, 0.9])
    listed = copying(evidence, features, GATE, rng=np.random.default_rng(0)).listed
    assert listed == ((2, "p2"), (0, "p0"))


@pytest.mark.parametrize(("images", "patients", "outcome"), [(10, 10, Outcome.FLAG), (11, 11, Outcome.FAIL), (40, 1, Outcome.FLAG)])
def test_more_copied_patients_than_a_person_can_excuse_fail_whoever_they_are(images: int, patients: int, outcome: Outcome) -> None:
    """The test counts patients of the pool alone; sixty copied others must not leave on one word. One patient copied often is one case."""
    evidence, features = with_ratios([0.1] * images + [0.9] * (40 - images))
    found = features.synthetic_approaches
    features = replace(
        features, synthetic_approaches=replace(found, patient=np.where(found.ratio < 0.5, found.patient % patients, found.patient))
    )
    verdict = copying(evidence, features, GATE, rng=np.random.default_rng(0))
    assert len(verdict.listed) == images
    assert verdict.outcome is outcome


def test_the_number_that_would_be_seen_among_all_of_training_has_power() -> None:
    """Of so many copied training patients, drawn at random, at least as many as are needed are of the pool in 8 of 10."""
    sets = [image_set(np.zeros((n, 1, 4, 4)), np.zeros(n), prefix=prefix) for n, prefix in ((300, "t"), (60, "c"))]
    evidence = evidence_of(*sets)
    inside = np.arange(360) < 60
    evidence = replace(evidence, in_pool=inside | (np.arange(360) >= 300))
    said = copying_module._all_copied(evidence, 8)
    copied = int(re.findall(r"0\.8 (\d+) among", said)[0])
    rng = np.random.default_rng(0)
    seen = [(rng.permutation(300)[:number] < 60).sum() >= 8 for number in (copied, copied - 3) for _ in range(4000)]
    assert np.mean(seen[:4000]) > 0.785
    assert np.mean(seen[4000:]) < 0.79
    assert copying_module._all_copied(replace(evidence, in_pool=np.arange(360) >= 300), 8) == ""


def test_the_interval_of_a_share_is_that_of_a_jackknife_of_four_figures() -> None:
    """Draws of four fifths without replacement vary by half of what the images do, and each of four figures errs in a quarter."""
    draws = 0.3 + 0.02 * np.random.default_rng(0).normal(size=100)
    part = fidelity_module._part(draws, np.ones(100), 200, 0.1, share=True)
    confidence = 1 - 2 * 0.025 / 4
    expected = share_interval(float(draws.mean()), 2 * float(draws.std(ddof=1)), 200, confidence)
    assert (part.low, part.high) == pytest.approx(expected)


def test_each_way_of_comparing_has_its_own_usual_ratio() -> None:
    """Whole images of 0.8 and slices of 0.1 that are usual: an image at 0.4 whole is listed, one whose slices lie at 0.09 is not."""
    rng = np.random.default_rng(0)

    def both(whole: np.ndarray, slices: np.ndarray, copy: float = 0.02) -> Approaches:
        number = np.arange(len(whole))
        return Approaches(
            item=np.concatenate([number, number]), patient=np.concatenate([number, number]), ratio=np.concatenate([whole, slices]),
            copy=np.full(2 * len(whole), copy), kind=np.repeat([0, 1], len(whole)),
        )  # fmt: skip

    evidence, features = with_ratios([0.9, 0.9, 0.9])
    real = both(0.8 * np.exp(0.02 * rng.normal(size=80)), 0.1 * np.exp(0.02 * rng.normal(size=80)))
    usual = usual_ratios(real)
    spread = np.array([0.8, 0.1]) * np.exp(0.02 * stats.norm.ppf(0.01 / 2))  # a hundredth over both ways
    np.testing.assert_allclose(usual, spread, rtol=0.02)
    drawn = both(np.array([0.4, 0.9, 0.9]), np.array([0.12, 0.09, 0.04]))
    verdict = copying(evidence, replace(features, synthetic_approaches=drawn, real_approaches=real), GATE, rng=rng)
    assert {image for image, _ in verdict.listed} == {0, 2}
    blind = both(0.8 * np.ones(80), np.full(80, 0.03))
    verdict = copying(evidence, replace(features, synthetic_approaches=drawn, real_approaches=blind), GATE, rng=rng)
    assert "nothing could be told by slices along the first axis" in verdict.reason
    assert "whole images" not in verdict.reason


@pytest.mark.parametrize(("copy", "share"), [(0.29, 1.0), (0.31, 0.0)])
def test_a_copy_is_plain_where_it_is_half_as_far_as_what_is_shown(copy: float, share: float) -> None:
    assert (
        visible(Approaches(item=np.arange(9), patient=np.arange(9), ratio=np.ones(9), copy=np.full(9, copy), kind=np.zeros(9, int)))
        == share
    )


def test_how_near_people_come_is_measured_on_patients_of_the_pool_among_all_others() -> None:
    """Never on synthetic images: copies would make themselves usual."""
    rng = np.random.default_rng(0)
    real = rng.uniform(-1, 1, (50, 1, 12, 12)).astype(np.float32)
    training, control = image_set(real[:30], np.zeros(30)), image_set(real[30:], np.zeros(20), prefix="c")
    evidence = evidence_of(training, control, real[:40].copy(), in_pool=np.arange(30) >= 10)
    features = compute_features(evidence, encoder=bundled(), progress=silent)
    alone = approaches(real[evidence.pool], real, np.arange(50), own=evidence.pool, progress=silent)
    np.testing.assert_allclose(features.real_approaches.ratio, alone.ratio, atol=1e-5)
    np.testing.assert_array_equal(features.real_approaches.item, np.arange(40))
    assert float(features.real_approaches.ratio.min()) > 0.5
    assert float(features.synthetic_approaches.ratio.max()) < 0.1
