"""What each check decides: its false-alarm rate, its power, and when it says that it cannot tell."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy import stats

from dpsynth.checks import suite
from dpsynth.checks.accounting import ALWAYS, REQUIRED, accounting
from dpsynth.checks.arms import Arms
from dpsynth.checks.classifier import train_and_predict
from dpsynth.checks.copying import copying
from dpsynth.checks.evidence import Evidence, Features, first_images
from dpsynth.checks.fidelity import fidelity
from dpsynth.checks.membership import membership
from dpsynth.checks.utility import utility
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig
from dpsynth.data.cohort import ImageSet
from dpsynth.progress import silent

GATE = GateConfig()
REPETITIONS = 200


def points(count: int, rng: np.random.Generator, width: int = 12) -> np.ndarray:
    return rng.normal(0, 1, (count, width))


def features(synthetic: np.ndarray, training: np.ndarray, control: np.ndarray) -> Features:
    return Features(
        synthetic=synthetic,
        training=training,
        control=control,
        synthetic_thumbnails=synthetic,
        mirrored_thumbnails=synthetic + 100,
        training_thumbnails=training,
        control_thumbnails=control,
    )


def image_set(images: np.ndarray, labels: np.ndarray, patients: np.ndarray | None = None, classes: int = 2) -> ImageSet:
    owners = np.arange(len(images)) if patients is None else patients
    return ImageSet(
        images=images.astype(np.float32),
        labels=labels.astype(np.int64),
        patients=owners.astype(np.int64),
        patient_ids=tuple(f"p{number}" for number in range(int(owners.max()) + 1)),
        classes=tuple(f"c{number}" for number in range(classes)),
        attributes=({},) * len(images),
    )


def evidence(training: ImageSet, control: ImageSet, synthetic: np.ndarray, labels: np.ndarray) -> Evidence:
    return Evidence(
        synthetic=synthetic.astype(np.float32),
        synthetic_labels=labels.astype(np.int64),
        training=training,
        control=control,
        selfcheck={name: {"ok": True, "detail": ""} for name in (*ALWAYS, *REQUIRED)},
        accounting_problems=(),
        ledger_problems=(),
        uses_sgd=True,
    )


def blank(patients: int) -> ImageSet:
    return image_set(np.zeros((patients, 1, 4, 4)), np.arange(patients) % 2)


def membership_of(synthetic: np.ndarray, training: np.ndarray, control: np.ndarray, seed: int = 0) -> Verdict:
    return membership(features(synthetic, training, control), GATE, rng=np.random.default_rng(seed))


def copying_of(synthetic: np.ndarray, training: np.ndarray, control: np.ndarray, seed: int = 0) -> Verdict:
    sets = evidence(blank(len(training)), blank(len(control)), np.zeros((1, 1, 4, 4)), np.zeros(1))
    return copying(sets, features(synthetic, training, control), GATE, rng=np.random.default_rng(seed))


@pytest.mark.parametrize("check", [membership_of, copying_of])
def test_no_more_false_alarms_than_stated(check) -> None:
    """Training and control patients are exchangeable: at a rate of 1 %, more than 10 alarms in 200 happen once in 100,000 times."""
    alarms = 0
    for seed in range(REPETITIONS):
        rng = np.random.default_rng(seed)
        alarms += check(points(80, rng), points(120, rng), points(60, rng), seed).outcome is Outcome.FAIL
    assert stats.binom.sf(alarms - 1, REPETITIONS, GATE.false_alarm_rate) > 1e-4, alarms


@pytest.mark.parametrize("check", [membership_of, copying_of])
def test_images_drawn_from_training_patients_fail(check) -> None:
    rng = np.random.default_rng(0)
    training, control = points(150, rng), points(100, rng)
    synthetic = training[rng.integers(150, size=200)] + 0.05 * points(200, rng)
    verdict = check(synthetic, training, control)
    assert verdict.outcome is Outcome.FAIL
    assert verdict.figures["p"] < GATE.false_alarm_rate


@pytest.mark.parametrize("check", [membership_of, copying_of])
def test_with_few_patients_it_cannot_tell(check) -> None:
    rng = np.random.default_rng(0)
    assert check(points(50, rng), points(10, rng), points(8, rng)).outcome is Outcome.INCONCLUSIVE


@pytest.mark.parametrize(("copied", "least"), [(40, 0.95), (20, 0.5)])
def test_power_of_the_copying_check(copied: int, least: float) -> None:
    caught = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        training, control = points(160, rng), points(100, rng)
        synthetic = np.concatenate([training[:copied] + 0.02 * points(copied, rng), points(150, rng)])
        caught += copying_of(synthetic, training, control, seed).outcome is Outcome.FAIL
    assert caught >= least * 20, caught


def test_one_patient_copied_a_hundred_times_counts_once_and_goes_to_a_person() -> None:
    rng = np.random.default_rng(0)
    training, control = points(150, rng), points(100, rng)
    synthetic = np.concatenate([np.repeat(training[:1], 100, axis=0) + 1e-3, points(50, rng)])
    verdict = copying_of(synthetic, training, control)
    assert verdict.outcome is Outcome.FLAG
    assert verdict.figures["training patients"] <= 1
    assert "a person must look" in verdict.reason


def test_images_of_one_patient_count_once() -> None:
    patients = np.repeat(np.arange(30), 5)
    cohort = image_set(np.random.default_rng(0).uniform(-1, 1, (150, 1, 4, 4)), patients % 2, patients)
    assert len(first_images(cohort)) == 30


def fidelity_of(synthetic: np.ndarray, count: int = 120, gate: GateConfig = GATE) -> Verdict:
    rng = np.random.default_rng(1)
    return fidelity(features(synthetic, points(count, rng), points(count, rng)), gate, rng=np.random.default_rng(0))


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
    sets = evidence(image_set(*bars(200, 0)), image_set(*bars(control, 1)), images, labels)
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
    assert utility_of(images[labels == 0], labels[labels == 0]).outcome is Outcome.INCONCLUSIVE


def test_accounting_names_every_problem() -> None:
    good = evidence(blank(10), blank(10), np.zeros((1, 1, 4, 4)), np.zeros(1))
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


def test_a_check_that_breaks_is_inconclusive_and_never_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = bars(60, 0)
    sets = evidence(image_set(images, labels), image_set(*bars(60, 1)), images, labels)

    def broken(*_: object, **__: object) -> Verdict:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(
        suite, "compute_features", lambda *_, **__: features(points(60, np.random.default_rng(0)), *[images.reshape(60, -1)] * 2)
    )
    monkeypatch.setattr(suite, "describe", lambda *_, **__: {})
    for name in ("membership", "copying", "fidelity", "utility"):
        monkeypatch.setattr(suite, name, broken)
    verdicts = {verdict.check: verdict for verdict in suite.run_checks(sets, GATE, seed=0, progress=silent)}
    assert set(verdicts) == {"accounting", "membership", "copying", "fidelity", "utility", "content", "fairness"}
    assert verdicts["accounting"].outcome is Outcome.PASS
    for name in ("membership", "copying", "fidelity", "utility"):
        assert verdicts[name].outcome is Outcome.INCONCLUSIVE
        assert "by zero" in verdicts[name].reason


def test_a_verdict_survives_json_and_its_public_form_has_no_numbers() -> None:
    rng = np.random.default_rng(0)
    verdict = membership_of(points(80, rng), points(120, rng), points(60, rng))
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict
    public = json.dumps(verdict.to_public_json())
    assert f"{verdict.statistic:.4g}" not in public
    assert verdict.reason not in public
