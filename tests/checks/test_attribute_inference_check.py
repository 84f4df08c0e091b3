"""Attribute inference: found when training patients' values come with their images, and only then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from evidence_cases import evidence_of, features_of, image_set
from scipy import stats

from dpsynth.checks import suite
from dpsynth.checks.attributes import LABEL, attributes, guesses, secrets
from dpsynth.checks.evidence import Evidence, Features
from dpsynth.checks.family import ALONE, FAMILY, decide_family, members, strictest
from dpsynth.checks.statistics import coin_flip_p, coin_flip_ranks_p, difference_of_rates, wilson
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig
from dpsynth.progress import silent

GATE = GateConfig()
REQUIRED = GateConfig(required=(*GATE.required, "attributes"))
REPETITIONS = 200
WIDTH = 8


def people(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, sexes that the points tell a little of, and diagnoses that they mostly do not."""
    points = rng.normal(0, 1, (count, WIDTH))
    sexes = np.where(points[:, 0] + rng.normal(0, 1, count) > 0, "F", "M")
    return points, sexes, (points[:, 1] + rng.normal(0, 3, count) > 0).astype(int)


class Hospital:
    """Some always trained on, those of the pool by a fair coin."""

    def __init__(self, rng: np.random.Generator, *, always: int = 40, pool: int = 160) -> None:
        points, sexes, labels = people(always + pool, rng)
        inside = np.r_[np.ones(always, dtype=bool), rng.random(pool) < 0.5]
        self.training, self.control = points[inside], points[~inside]
        self.sexes, self.labels = sexes[inside], labels[inside]
        sides = []
        for side, prefix in ((inside, "t"), (~inside, "c")):
            values = tuple({"sex": str(sex)} for sex in sexes[side])
            sides.append(image_set(np.zeros((side.sum(), 1, 4, 4)), labels[side], prefix=prefix, attributes=values))
        self.sets = evidence_of(*sides, in_pool=np.arange(inside.sum()) >= always)

    def given(self, points: np.ndarray, sexes: np.ndarray, labels: np.ndarray) -> tuple[Evidence, Features]:
        blank = np.zeros((len(points), 1, 4, 4), dtype=np.float32)
        sets = replace(self.sets, synthetic=blank, synthetic_labels=labels.astype(np.int64), synthetic_attributes={"sex": sexes})
        return sets, features_of(points, self.training, self.control, self.sets.in_pool)

    def judge(self, synthetic: tuple[np.ndarray, np.ndarray, np.ndarray], gate: GateConfig = REQUIRED, seed: int = 0) -> Verdict:
        found = attributes(*self.given(*synthetic), gate, rng=np.random.default_rng(seed))
        return decide_family([found], gate.family_error, family=members(gate.required))[0]


Generate = Callable[[Hospital, np.random.Generator], tuple[np.ndarray, np.ndarray, np.ndarray]]


def honest(_: Hospital, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return people(200, rng)


def smooth(_: Hospital, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    points, sexes, labels = people(200, rng)
    return 0.6 * points, sexes, labels


def carries_values(hospital: Hospital, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Known to be bad: blurred training patients, each with their own sex and diagnosis."""
    rows = rng.integers(len(hospital.training), size=200)
    return hospital.training[rows] + rng.normal(0, 0.3, (200, WIDTH)), hospital.sexes[rows], hospital.labels[rows]


def carries_the_sex_alone(hospital: Hospital, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    points, sexes, labels = carries_values(hospital, rng)
    return points, sexes, rng.permutation(labels)


def copies_without_values(hospital: Hospital, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Membership leaks, values do not: the images are those of training patients, the values by a coin."""
    points, _, _ = carries_values(hospital, rng)
    return points, np.where(rng.random(200) < 0.5, "F", "M"), rng.integers(0, 2, 200)


@pytest.mark.parametrize(("generators", "repetitions"), [((honest, smooth), REPETITIONS), ((copies_without_values,), REPETITIONS // 2)])
def test_it_accuses_no_more_often_than_stated(generators: tuple[Generate, ...], repetitions: int) -> None:
    """Nothing can be learned about those in training alone: at 1 % more than 7 accusations in 200 happen once in 900."""
    small, accused = 0, 0
    for seed in range(repetitions):
        rng = np.random.default_rng(seed)
        hospital = Hospital(rng)
        verdict = hospital.judge(generators[seed % len(generators)](hospital, rng), GATE, seed)
        small += verdict.figures["p"] <= 0.05
        accused += verdict.outcome is Outcome.FLAG
    assert stats.binom.sf(accused - 1, repetitions, ALONE) > 1e-3, accused
    assert stats.binom.sf(small - 1, repetitions, 0.05) > 1e-3, small


@pytest.mark.parametrize(("generate", "named"), [(carries_values, ("sex", LABEL)), (carries_the_sex_alone, ("sex",))])
def test_values_that_come_with_training_images_fail(generate: Generate, named: tuple[str, ...]) -> None:
    caught = 0
    for seed in range(20):
        rng = np.random.default_rng(1000 + seed)
        hospital = Hospital(rng)
        verdict = hospital.judge(generate(hospital, rng), seed=seed)
        caught += verdict.outcome is Outcome.FAIL
        assert verdict.outcome is not Outcome.FAIL or any(f"most for {name}" in verdict.reason for name in named), verdict.reason
        assert verdict.figures["risk, sex"] > 0.1
    assert caught >= 18, caught


@pytest.mark.parametrize(("gate", "outcome"), [(GATE, Outcome.FLAG), (REQUIRED, Outcome.FAIL)])
def test_the_suite_decides_it_with_the_family_when_the_policy_requires_it(
    monkeypatch: pytest.MonkeyPatch, gate: GateConfig, outcome: Outcome
) -> None:
    rng = np.random.default_rng(0)
    hospital = Hospital(rng)
    sets, features = hospital.given(*carries_values(hospital, rng))
    monkeypatch.setattr(suite, "compute_features", lambda *_, **__: features)
    verdicts = {verdict.check: verdict for verdict in suite.run_checks(sets, gate, seed=0, progress=silent)}
    assert verdicts["attributes"].outcome is outcome


def test_without_the_policys_word_it_can_only_flag_and_the_family_stays_as_it_is() -> None:
    rng = np.random.default_rng(0)
    hospital = Hospital(rng)
    bad = carries_values(hospital, rng)
    alone, required = hospital.judge(bad, GATE), hospital.judge(bad, REQUIRED)
    assert (alone.outcome, required.outcome) == (Outcome.FLAG, Outcome.FAIL)
    assert alone.false_alarm_rate == ALONE
    assert "p after Holm" not in alone.figures
    assert members(GATE.required) == FAMILY
    assert strictest(GATE) == 0.05 / 4
    assert strictest(REQUIRED) == 0.05 / 5
    suspicious = replace(attributes(*hospital.given(*bad), REQUIRED, rng=rng), p_value=0.011)
    assert decide_family([suspicious], 0.05, family=members(REQUIRED.required))[0].outcome is suspicious.outcome  # not below 0.05 / 5
    assert decide_family([replace(suspicious, p_value=0.009)], 0.05, family=members(REQUIRED.required))[0].outcome is Outcome.FAIL
    assert decide_family([suspicious], 0.05)[0].outcome is suspicious.outcome  # nor below 0.01


def test_what_it_could_have_seen_is_said_and_few_patients_are_not_enough() -> None:
    rng = np.random.default_rng(1)
    verdict = Hospital(rng).judge(honest(Hospital(rng), rng))
    assert verdict.outcome is Outcome.PASS
    assert f"an AUC of {verdict.figures['smallest detectable AUC']:.2f} would have been seen" in verdict.reason
    rng = np.random.default_rng(1)
    assert Hospital(rng, pool=40).judge(people(200, rng)).outcome is Outcome.INCONCLUSIVE
    assert Hospital(rng, pool=12).judge(people(200, rng)).outcome is Outcome.INCONCLUSIVE


def test_without_attributes_and_with_one_label_there_is_nothing_to_learn() -> None:
    rng = np.random.default_rng(2)
    hospital = Hospital(rng)
    sets, features = hospital.given(*people(50, rng))
    one = replace(sets, synthetic_attributes={}, synthetic_labels=np.zeros(50, dtype=np.int64))
    verdict = attributes(one, features, REQUIRED, rng=rng)
    assert verdict.outcome is Outcome.PASS
    assert verdict.p_value is None
    assert "nothing can be learned" in verdict.reason


def test_a_value_that_no_synthetic_image_has_is_left_out_of_the_test() -> None:
    rng = np.random.default_rng(3)
    hospital = Hospital(rng)
    points, sexes, labels = people(120, rng)
    sexes = np.where(sexes == "F", "other", "M")
    sets, features = hospital.given(points, sexes, labels)
    found = guesses(sets, features, secrets(sets))
    values = np.array([value["sex"] for value in (*sets.training.attributes, *sets.control.attributes)])[sets.pool]
    np.testing.assert_array_equal(np.isnan(found.scores["sex"]), values == "F")
    assert np.isfinite(found.scores[LABEL]).all()


def test_scores_and_guesses_by_loops() -> None:
    rng = np.random.default_rng(4)
    hospital = Hospital(rng, always=5, pool=30)
    points, sexes, labels = people(40, rng)
    sets, features = hospital.given(points, sexes, labels)
    found = guesses(sets, features, secrets(sets))
    real = np.concatenate([hospital.training, hospital.control])
    values = np.array([value["sex"] for value in (*sets.training.attributes, *sets.control.attributes)])
    raw = []
    for patient in sets.pool:
        to_synthetic = np.linalg.norm(points - real[patient], axis=1)
        to_real = np.linalg.norm(real - real[patient], axis=1)
        to_real[patient] = np.inf
        parts = [
            np.log(d[v != values[patient]].min() + 1e-9) - np.log(d[v == values[patient]].min() + 1e-9)
            for d, v in ((to_synthetic, sexes), (to_real, values))
        ]
        raw.append(parts[0] - parts[1])
        assert found.right["sex"][list(sets.pool).index(patient)] == (sexes[to_synthetic.argmin()] == values[patient])
    expected = 2 * (np.array(raw) - np.median(raw)) / np.std(raw)  # both spaces are the same here
    np.testing.assert_allclose(found.scores["sex"], expected, rtol=1e-5, atol=1e-6)


def test_the_test_over_several_scores_is_exact_by_enumeration_and_agrees_with_the_one_for_one() -> None:
    scores = np.array([[3.0, 1, 4, 1.5, 9, 2, 6, 5], [2.0, 7, np.nan, 8, np.nan, 2.5, 0, 1]])
    inside = np.array([1, 0, 1, 0, 1, 0, 1, 1], dtype=bool)
    ranks = np.array([[4, 1, 5, 2, 8, 3, 7, 6], [3, 5, 0, 6, 0, 4, 1, 2]], dtype=float)
    ranks[0] -= 4.5
    ranks[1] = np.where(ranks[1] > 0, ranks[1] - 3.5, 0)
    ranks /= np.linalg.norm(ranks, axis=1, keepdims=True)
    every = np.array(list(product((-1, 1), repeat=8))) @ ranks.T
    exact = float(np.mean(every.max(axis=1) >= ((2 * inside - 1) @ ranks.T).max() - 1e-9))
    p, telling = coin_flip_ranks_p(scores, inside, rng=np.random.default_rng(0))
    assert p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 9999))
    assert telling == 0
    one = coin_flip_ranks_p(scores[:1], inside, rng=np.random.default_rng(0))[0]
    assert one == pytest.approx(coin_flip_p(scores[0], inside, rng=np.random.default_rng(0)))


def test_intervals_of_rates_and_of_their_difference_are_those_of_the_literature() -> None:
    """Newcombe 1998, Statistics in Medicine 17: 857 (81/263 and 1/29) and 873 (cases a and d, method 10)."""
    assert wilson(81, 263, 0.95) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(1, 29, 0.95) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert difference_of_rates((56, 70), (48, 80), 0.95) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert difference_of_rates((9, 10), (3, 10), 0.95) == pytest.approx((0.1705, 0.8090), abs=5e-5)
    assert difference_of_rates((0, 0), (3, 10), 0.95) == (-1, 1)
