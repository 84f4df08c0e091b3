"""What each check decides: its false-alarm rate, its power, and when it says that it cannot tell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from evidence_cases import blank, evidence_of, features_of, image_set
from scipy import stats

from dpsynth.checks import suite
from dpsynth.checks.accounting import ALWAYS, REQUIRED, accounting
from dpsynth.checks.arms import Arms
from dpsynth.checks.classifier import train_and_predict
from dpsynth.checks.copying import SCREENED_BELOW, copies_needed, copying
from dpsynth.checks.evidence import Evidence, Features, first_images
from dpsynth.checks.family import FAMILY, decide_family, holm, strictest
from dpsynth.checks.fidelity import fidelity
from dpsynth.checks.groups import ISOLATED, groups
from dpsynth.checks.membership import membership, pool_scores
from dpsynth.checks.utility import utility
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig
from dpsynth.progress import silent

GATE = GateConfig()
REPETITIONS = 100


def points(count: int, rng: np.random.Generator, width: int = 12) -> np.ndarray:
    return rng.normal(0, 1, (count, width))


@dataclass(frozen=True)
class Hospital:
    """Points for patients: some always trained on, those of the pool by a fair coin."""

    training: np.ndarray
    control: np.ndarray
    in_pool: np.ndarray

    @classmethod
    def drawn(cls, rng: np.random.Generator, *, always: int = 60, pool: int = 160) -> Hospital:
        people, inside = points(always + pool, rng), rng.random(pool) < 0.5
        training = np.concatenate([people[:always], people[always:][inside]])
        return cls(training, people[always:][~inside], np.arange(len(training)) >= always)

    def sets(self, attributes: tuple[Mapping[str, str], ...] | None = None) -> Evidence:
        training = image_set(np.zeros((len(self.training), 1, 4, 4)), np.zeros(len(self.training)), attributes=attributes)
        return evidence_of(training, blank(len(self.control), "c"), in_pool=self.in_pool)

    def features(self, synthetic: np.ndarray) -> Features:
        return features_of(synthetic, self.training, self.control, self.in_pool)

    def judge(self, synthetic: np.ndarray, seed: int = 0) -> dict[str, Verdict]:
        """The checks of the family that see images, after Holm."""
        features, sets = self.features(synthetic), self.sets()
        sets = replace(sets, synthetic=np.zeros((len(synthetic), 1, 4, 4), np.float32))
        scores = pool_scores(sets, features)
        rngs = [np.random.default_rng([seed, number]) for number in range(3)]
        found = [
            membership(sets, GATE, scores=lambda: scores, rng=rngs[0]),
            copying(sets, features, GATE, rng=rngs[1]),
            groups(sets, features, GATE, scores=lambda: scores, rng=rngs[2]),
        ]
        return {verdict.check: verdict for verdict in decide_family(found, GATE.family_error)}


def test_the_family_accuses_no_more_often_than_stated() -> None:
    """Nothing is copied: at a family error of 5 %, 100 repetitions accuse anyone more than 14 times once in 5,000."""
    accused, alone = 0, dict.fromkeys(("membership", "copying", "groups"), 0)
    for seed in range(REPETITIONS):
        rng = np.random.default_rng(seed)
        hospital = Hospital.drawn(rng)
        smoother = 0.6 if seed % 2 else 1.0  # a blurred generator lies nearer to everybody and must not be accused for it
        verdicts = hospital.judge(smoother * points(150, rng), seed)
        accused += any("after Holm" in verdict.reason for verdict in verdicts.values())
        for name, verdict in verdicts.items():
            alone[name] += verdict.figures["p"] <= 0.05
    assert stats.binom.sf(accused - 1, REPETITIONS, GATE.family_error) > 2e-4, accused
    for name, count in alone.items():
        assert stats.binom.sf(count - 1, REPETITIONS, 0.05) > 2e-4, (name, count)


def test_images_drawn_from_training_patients_fail_by_every_check_that_can_see_it() -> None:
    rng = np.random.default_rng(0)
    hospital = Hospital.drawn(rng)
    verdicts = hospital.judge(hospital.training[rng.integers(len(hospital.training), size=300)] + 0.05 * points(300, rng))
    assert verdicts["membership"].outcome is Outcome.FAIL
    assert verdicts["copying"].outcome is Outcome.FAIL
    assert verdicts["groups"].outcome is Outcome.FLAG
    assert verdicts["membership"].lower_bound > 1
    assert f"epsilon is at least {verdicts['membership'].lower_bound:.2f}" in verdicts["membership"].reason
    assert "8.00 is claimed" in verdicts["membership"].reason


def test_a_bound_above_the_claim_is_said_to_refute_it() -> None:
    rng = np.random.default_rng(0)
    hospital = Hospital.drawn(rng, pool=400)
    synthetic = hospital.training + 0.01 * points(len(hospital.training), rng)
    sets = replace(hospital.sets(), epsilon=0.5)
    features = hospital.features(synthetic)
    verdict = membership(sets, GATE, scores=lambda: pool_scores(sets, features), rng=rng)
    assert "refutes the claim" in decide_family([verdict], GATE.family_error)[0].reason


def test_what_would_have_been_seen_is_said_also_when_they_accuse() -> None:
    rng = np.random.default_rng(0)
    hospital = Hospital.drawn(rng)
    honest = hospital.judge(points(300, rng))
    accused = hospital.judge(hospital.training[rng.integers(len(hospital.training), size=300)] + 0.05 * points(300, rng))
    flagged = hospital.judge(np.concatenate([np.repeat(hospital.training[-1:], 3, axis=0) + 1e-3, points(80, rng)]))["copying"]
    assert flagged.outcome is Outcome.FLAG
    for verdict in (*honest.values(), *accused.values(), flagged):
        assert "would have been seen" in verdict.reason, verdict.check
    assert "after Holm" in accused["copying"].reason


def test_with_few_patients_they_cannot_tell() -> None:
    rng = np.random.default_rng(0)
    verdicts = Hospital.drawn(rng, pool=24).judge(points(50, rng))
    assert verdicts["membership"].outcome is Outcome.INCONCLUSIVE
    assert verdicts["copying"].outcome is Outcome.INCONCLUSIVE
    assert "too small to test" in verdicts["groups"].reason or verdicts["groups"].outcome is Outcome.PASS


@pytest.mark.parametrize(("copied", "least"), [(50, 0.95), (24, 0.6)])
def test_power_of_the_copying_check(copied: int, least: float) -> None:
    """Of 140 training patients 80 are in the pool: 50 copied ones are about 28 of the pool, 24 about 14."""
    caught = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        hospital = Hospital.drawn(rng)
        chosen = rng.permutation(len(hospital.training))[:copied]
        synthetic = np.concatenate([hospital.training[chosen] + 0.02 * points(copied, rng), points(150, rng)])
        caught += hospital.judge(synthetic, seed)["copying"].outcome is Outcome.FAIL
    assert caught >= least * 20, caught


def under_two_ids(share: float, rng: np.random.Generator, *, always: int = 60, pool: int = 340) -> Hospital:
    """A hospital where this share of the patients are there a second time, a little changed, under other ids."""
    people = points(always + pool, rng)
    doubles = rng.permutation(len(people))[: 2 * round(share * len(people) / 2)]
    half = len(doubles) // 2
    people[doubles[half:]] = people[doubles[:half]] + 1e-3 * points(half, rng)
    inside = rng.random(pool) < 0.5
    training = np.concatenate([people[:always], people[always:][inside]])
    return Hospital(training, people[always:][~inside], np.arange(len(training)) >= always)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.06])
def test_people_under_two_ids_hide_no_copies(share: float) -> None:
    """Sixty copies fail and a single one is shown, of whomever, though some people lie as near to each other as a copy does."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        hospital = under_two_ids(share, rng)
        chosen = hospital.training[rng.permutation(len(hospital.training))[:60]]
        many = hospital.judge(np.concatenate([chosen + 1e-3 * points(60, rng), points(300, rng)]), seed)["copying"]
        assert many.outcome is Outcome.FAIL, many.reason
        assert {image for image, _ in many.listed} >= set(range(60))
        one = hospital.judge(np.concatenate([chosen[:1] + 1e-3, points(300, rng)]), seed)["copying"]
        assert one.outcome is Outcome.FLAG, one.reason
        assert one.listed[0][0] == 0


def test_a_copy_of_somebody_under_two_ids_is_shown() -> None:
    rng = np.random.default_rng(1)
    hospital = under_two_ids(0.02, rng)
    apart = np.linalg.norm(hospital.training[:, None] - hospital.training[None], axis=2) + np.eye(len(hospital.training)) * 9
    double = int(np.argmin(apart.min(axis=1)))
    assert apart.min() < 0.1
    verdict = hospital.judge(np.concatenate([hospital.training[double : double + 1] + 1e-3, points(300, rng)]))["copying"]
    assert 0 in {image for image, _ in verdict.listed}


def test_where_everybody_has_a_double_nothing_can_be_told_and_that_is_said() -> None:
    """Three ids a person: a copy is no nearer to its patient than the two others, so the check must not pass."""
    rng = np.random.default_rng(0)
    people = np.repeat(points(140, rng), 3, axis=0) + 1e-3 * points(420, rng)
    inside = rng.random(420) < 0.5
    hospital = Hospital(people[inside], people[~inside], np.ones(int(inside.sum()), dtype=bool))
    verdict = hospital.judge(points(300, rng))["copying"]
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "of 100% of the pool patients no copy could be told" in verdict.reason


@pytest.mark.parametrize(("alone", "outcome"), [(300, Outcome.FLAG), (130, Outcome.INCONCLUSIVE)])
def test_one_listed_image_makes_no_check_that_sees_less_than_half_conclusive(alone: int, outcome: Outcome) -> None:
    """Fifty people under four ids each, and so many single ones, of whom one is copied."""
    rng = np.random.default_rng(0)
    fourfold = np.repeat(points(50, rng), 4, axis=0) + 1e-3 * points(200, rng)
    people = np.concatenate([fourfold, points(alone, rng)])
    inside = rng.random(len(people)) < 0.5
    inside[-1] = True
    hospital = Hospital(people[inside], people[~inside], np.ones(int(inside.sum()), dtype=bool))
    verdict = hospital.judge(np.concatenate([people[-1:] + 1e-3, points(300, rng)]))["copying"]
    assert 0 in {image for image, _ in verdict.listed}
    assert verdict.outcome is outcome, verdict.reason


def test_one_patient_copied_a_hundred_times_counts_once_and_goes_to_a_person() -> None:
    rng = np.random.default_rng(0)
    hospital = Hospital.drawn(rng)
    synthetic = np.concatenate([np.repeat(hospital.training[-1:], 100, axis=0) + 1e-3, points(50, rng)])
    verdict = hospital.judge(synthetic)["copying"]
    assert verdict.outcome is Outcome.FLAG
    assert "a person must look" in verdict.reason
    assert {patient for _, patient in verdict.listed} == {f"p{len(hospital.training) - 1}"}
    assert sorted(image for image, _ in verdict.listed) == list(range(100))
    assert len(verdict.ratios) == 100
    assert max(verdict.ratios) < verdict.figures[SCREENED_BELOW]
    assert list(verdict.ratios) == sorted(verdict.ratios), "the closest comes first"
    assert "control patients" not in verdict.reason


def test_a_copied_control_patient_says_that_the_control_set_has_leaked() -> None:
    rng = np.random.default_rng(0)
    hospital = Hospital.drawn(rng)
    verdict = hospital.judge(np.concatenate([hospital.control[:3] + 1e-3, points(80, rng)]))["copying"]
    assert verdict.outcome is Outcome.FLAG
    assert "3 of them resemble control patients, who were never to be trained on" in verdict.reason


def test_subgroups_are_named_and_the_isolated_ones_are_chosen_without_the_images() -> None:
    """Only the patients of one site are memorised: the group is flagged by name although most patients are safe."""
    rng = np.random.default_rng(2)
    hospital = Hospital.drawn(rng, pool=400)
    sites = rng.integers(0, 4, len(hospital.training) + len(hospital.control))
    attributes = [{"site": f"s{site}", "age_years": str(number)} for number, site in enumerate(sites)]
    split = len(hospital.training)
    sets = replace(
        hospital.sets(tuple(attributes[:split])),
        control=image_set(
            np.zeros((len(hospital.control), 1, 4, 4)), np.zeros(len(hospital.control)), prefix="c", attributes=tuple(attributes[split:])
        ),
    )
    theirs = hospital.training[sites[:split] == 2]
    features = hospital.features(np.concatenate([theirs + 0.05 * points(len(theirs), rng), points(200, rng)]))
    verdict = decide_family([groups(sets, features, GATE, scores=lambda: pool_scores(sets, features), rng=rng)], GATE.family_error)[0]
    assert verdict.outcome is Outcome.FLAG
    assert "site s2" in verdict.reason
    assert not any("age_years" in name for name in verdict.figures)
    pool = np.concatenate([hospital.training, hospital.control])[sets.pool]
    assert verdict.figures[f"patients, {ISOLATED}"] == round(0.1 * len(pool))


def test_holm_by_hand_and_a_check_that_broke_keeps_its_place() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {"a": pytest.approx(0.03), "c": pytest.approx(0.06), "b": pytest.approx(0.06)}
    assert strictest(GATE) == 0.05 / len(FAMILY)
    rng = np.random.default_rng(0)
    hospital = Hospital.drawn(rng)
    sets, features = hospital.sets(), hospital.features(points(80, rng))
    verdict = membership(sets, GATE, scores=lambda: pool_scores(sets, features), rng=rng)
    suspicious = replace(verdict, p_value=0.02)
    assert decide_family([suspicious], 0.05)[0].outcome is verdict.outcome  # 0.02 is not below 0.05 / 4
    assert decide_family([replace(verdict, p_value=0.012)], 0.05)[0].outcome is Outcome.FAIL
    others = [replace(verdict, check=name, p_value=1e-4) for name in FAMILY if name != "membership"]
    assert decide_family([suspicious, *others], 0.05)[0].outcome is Outcome.FAIL  # the last of four is tested at 0.05
    assert copies_needed(0.0125) == 7


def test_images_of_one_patient_count_once() -> None:
    patients = np.repeat(np.arange(30), 5)
    cohort = image_set(np.random.default_rng(0).uniform(-1, 1, (150, 1, 4, 4)), patients % 2, patients)
    assert len(first_images(cohort)) == 30


def fidelity_of(synthetic: np.ndarray, count: int = 120, gate: GateConfig = GATE) -> Verdict:
    rng = np.random.default_rng(1)
    return fidelity(features_of(synthetic, points(count, rng), points(count, rng)), gate, rng=np.random.default_rng(0))


def test_fidelity_passes_real_images_and_fails_noise_and_a_single_image() -> None:
    rng = np.random.default_rng(5)
    assert fidelity_of(points(120, rng)).outcome is Outcome.PASS
    noise = fidelity_of(points(120, rng) * 8)
    assert noise.outcome is Outcome.FAIL
    assert "look real" in noise.reason
    collapsed = fidelity_of(np.repeat(points(1, rng) * 0.1, 120, axis=0) + 1e-6 * points(120, rng))
    assert collapsed.outcome is Outcome.FAIL
    assert "alike" in collapsed.reason
    strict = GATE.model_copy(update={"smallest_coverage": 0.4})
    assert fidelity_of(points(120, rng), gate=strict).outcome is Outcome.PASS
    few = fidelity_of(np.repeat(points(2, rng), 60, axis=0) + 1e-6 * points(120, rng), gate=strict)
    assert few.outcome is Outcome.FAIL
    assert "variety" in few.reason
    assert fidelity_of(points(120, rng), count=20).outcome is Outcome.INCONCLUSIVE
    repeated = fidelity_of(np.repeat(points(30, rng), 4, axis=0) + 0.05 * rng.normal(size=(120, 12)))
    assert repeated.outcome is Outcome.FAIL
    assert "repeat each other" in repeated.reason


def bars(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A task that a small classifier learns: a bright bar, upright or lying, in noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = rng.normal(0, 0.4, (count, 1, 12, 12))
    for row, label in enumerate(labels):
        place = rng.integers(2, 10)
        images[row, 0, :, place] += 0.8 * label
        images[row, 0, place, :] += 0.8 * (1 - label)
    return np.clip(images, -1, 1), labels


@cache
def real_arm(control: int) -> np.ndarray:
    return train_and_predict(*single_precision(200, 0), single_precision(control, 1)[0], classes=2, seed=0, task="", progress=silent)


def single_precision(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = bars(count, seed)
    return images.astype(np.float32), labels.astype(np.int64)


def arms_of(sets: Evidence) -> Arms:
    """The two arms that decide; the real one, which is the same in all calls, is trained once. `train_arms` is tested by itself."""
    real = real_arm(len(sets.control.images))
    ours = train_and_predict(sets.synthetic, sets.synthetic_labels, sets.control.images, classes=2, seed=0, task="", progress=silent)
    return Arms(synthetic=ours, real=real, both=real, synthetic_by_real=np.eye(2)[sets.synthetic_labels])


def utility_of(images: np.ndarray, labels: np.ndarray, control: int = 300) -> Verdict:
    sets = evidence_of(image_set(*bars(200, 0)), image_set(*bars(control, 1), prefix="c"), images, labels)
    return utility(sets, GATE, arms=lambda: arms_of(sets), rng=np.random.default_rng(0))


def test_utility_passes_real_images_fails_shuffled_labels_and_cannot_tell_without_a_class() -> None:
    images, labels = bars(200, 2)
    good = utility_of(images, labels)
    assert good.outcome is Outcome.PASS, good.reason
    assert good == utility_of(images, labels)
    shuffled = utility_of(images, np.random.default_rng(0).permutation(labels))
    assert shuffled.outcome is Outcome.FAIL, shuffled.reason
    swapped = utility_of(images, 1 - labels)
    assert swapped.outcome is Outcome.FAIL
    for verdict in (good, shuffled, swapped):
        low, high = verdict.interval
        assert f"{verdict.statistic:+.3f} ± {(high - low) / 2:.3f} (90%, 300 control patients)" in verdict.reason
    assert utility_of(images[labels == 0], labels[labels == 0]).outcome is Outcome.INCONCLUSIVE


def test_accounting_names_every_problem() -> None:
    good = evidence_of()
    assert accounting(good).outcome is Outcome.PASS
    for name in (*ALWAYS, *REQUIRED):
        failed = replace(good, selfcheck={**good.selfcheck, name: {"ok": False, "detail": "half the noise"}})
        assert accounting(failed).outcome is Outcome.FAIL
        assert f"{name}: half the noise" in accounting(failed).reason
        missing = replace(good, selfcheck={key: value for key, value in good.selfcheck.items() if key != name})
        assert accounting(missing).outcome is Outcome.INCONCLUSIVE
        assert name in accounting(missing).reason
    for problems in ({"accounting_problems": ("PRV differs",)}, {"ledger_problems": ("line 3: hash",)}):
        verdict = accounting(replace(good, **problems))  # type: ignore[arg-type]
        assert verdict.outcome is Outcome.FAIL
        assert next(iter(problems.values()))[0] in verdict.reason


BROKEN = ("mechanism", "membership", "copying", "groups", "attributes", "fidelity", "utility")


def test_a_check_that_breaks_is_inconclusive_and_never_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = bars(60, 0)
    sets = evidence_of(image_set(images, labels), image_set(*bars(60, 1), prefix="c"), images, labels)

    def broken(*_: object, **__: object) -> Verdict:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(
        suite,
        "compute_features",
        lambda *_, **__: features_of(points(60, np.random.default_rng(0)), *[points(60, np.random.default_rng(1))] * 2),
    )
    monkeypatch.setattr(suite, "describe", lambda *_, **__: {})
    for name in BROKEN:
        monkeypatch.setattr(suite, name, broken)
    verdicts = {verdict.check: verdict for verdict in suite.run_checks(sets, GATE, seed=0, progress=silent)}
    assert set(verdicts) == {"accounting", "content", "fairness", *BROKEN}
    assert verdicts["accounting"].outcome is Outcome.PASS
    for name in BROKEN:
        assert verdicts[name].outcome is Outcome.INCONCLUSIVE
        assert "by zero" in verdicts[name].reason


def test_a_verdict_survives_json_and_its_public_form_has_no_numbers() -> None:
    rng = np.random.default_rng(0)
    judged = Hospital.drawn(rng).judge(points(80, rng))["membership"]
    verdict = replace(judged, listed=((3, "p7"),), ratios=(0.0815,), not_judged=("sex F",))
    for one in (verdict, replace(verdict, statistic=None, interval=None, threshold=None)):
        assert Verdict.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert verdict.family
    public = json.dumps(verdict.to_public_json())
    assert f"{verdict.statistic:.4g}" not in public
    assert verdict.reason not in public
    for secret in ("p7", "0.0815", "sex F"):
        assert secret not in public
