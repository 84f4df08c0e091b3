"""Does a classifier trained on the synthetic images work on real patients, beside one trained on real images?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpsynth.checks.classifier import auc, balanced_accuracy, train_and_predict
from dpsynth.checks.evidence import Evidence
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig
from dpsynth.data.cohort import Int64
from dpsynth.progress import Progress

Array = NDArray[np.float64]
QUESTION = "Is a classifier trained on the synthetic images nearly as good on real patients as one trained on real images?"
LIMITATION = (
    "It is one task (the label) and one small classifier on this site's control patients; it says nothing about other tasks or hospitals."
)
_RESAMPLES = 400
_CONFIDENCE = 0.90  # two-sided, so each limit holds at 95 %: the usual rule of non-inferiority


def utility(evidence: Evidence, gate: GateConfig, *, rng: np.random.Generator, seed: int, progress: Progress) -> Verdict:
    """Non-inferiority of AUC: PASS when the lower limit of TSTR - TRTR is above -margin, FAIL when the upper is below."""
    control, classes = evidence.control, len(evidence.control.classes)
    reason = _impossible(evidence)
    if reason:
        return _verdict(Outcome.INCONCLUSIVE, reason, 0.0, (-1.0, 1.0), gate, {})
    arms = {
        "synthetic images": (evidence.synthetic, evidence.synthetic_labels),
        "real images": (evidence.training.images, evidence.training.labels),
    }
    predictions = {
        name: train_and_predict(x, y, control.images, classes=classes, seed=seed, task=name, progress=progress)
        for name, (x, y) in arms.items()
    }
    tstr, trtr = (auc(predictions[name], control.labels) for name in arms)
    low, high = _interval(predictions["synthetic images"], predictions["real images"], control.labels, control.rows_of(), rng)
    figures = {
        "AUC, synthetic": tstr,
        "AUC, real": trtr,
        "balanced accuracy, synthetic": balanced_accuracy(predictions["synthetic images"], control.labels),
        "balanced accuracy, real": balanced_accuracy(predictions["real images"], control.labels),
    }
    text = f"AUC {tstr:.3f} trained on synthetic, {trtr:.3f} on real images"
    if low >= -gate.utility_margin:
        outcome, reason = Outcome.PASS, text
    elif high < -gate.utility_margin:
        outcome, reason = Outcome.FAIL, f"{text}: the loss is larger than {gate.utility_margin:g}"
    else:
        outcome, reason = (
            Outcome.INCONCLUSIVE,
            f"{text}: with {control.num_patients} control patients a loss above {gate.utility_margin:g} cannot be excluded",
        )
    return _verdict(outcome, reason, tstr - trtr, (low, high), gate, figures)


def _impossible(evidence: Evidence) -> str:
    for name, labels in (("synthetic images", evidence.synthetic_labels), ("control patients", evidence.control.labels)):
        counts = np.bincount(labels, minlength=len(evidence.control.classes))
        if counts.min() < 2:
            return f"a class has fewer than two {name}, so nothing can be trained or tested"
    return ""


def _interval(first: Array, second: Array, labels: Int64, rows_of: list[Int64], rng: np.random.Generator) -> tuple[float, float]:
    """Bootstrap over patients of the difference of AUCs."""
    differences = []
    for _ in range(_RESAMPLES):
        rows = np.concatenate([rows_of[int(patient)] for patient in rng.integers(len(rows_of), size=len(rows_of))])
        if len(np.unique(labels[rows])) == len(np.unique(labels)):
            differences.append(auc(first[rows], labels[rows]) - auc(second[rows], labels[rows]))
    tail = (1 - _CONFIDENCE) / 2
    return float(np.quantile(differences, tail)), float(np.quantile(differences, 1 - tail))


def _verdict(
    outcome: Outcome, reason: str, statistic: float, interval: tuple[float, float], gate: GateConfig, figures: dict[str, float]
) -> Verdict:
    return Verdict(
        check="utility",
        question=QUESTION,
        outcome=outcome,
        statistic_name="AUC trained on synthetic minus AUC trained on real",
        statistic=statistic,
        interval=interval,
        threshold=-gate.utility_margin,
        confidence_level=_CONFIDENCE,
        false_alarm_rate=(1 - _CONFIDENCE) / 2,
        reason=reason,
        limitation=LIMITATION,
        figures=figures,
    )
