"""Does a classifier trained on the synthetic images work on real patients, beside one trained on real images?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dpsynth.checks.arms import Arms, brier, calibration_error, impossible
from dpsynth.checks.classifier import auc, balanced_accuracy, recalls
from dpsynth.checks.delong import auc_difference
from dpsynth.checks.evidence import Evidence
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig
from dpsynth.data.cohort import Int64

Array = NDArray[np.float64]
QUESTION = "Is a classifier trained on the synthetic images nearly as good on real patients as one trained on real images?"
LIMITATION = (
    "It is one task (the label) and one small classifier on this site's control patients; it says nothing about other tasks or hospitals."
)
_RESAMPLES = 400
_CONFIDENCE = 0.90  # two-sided, so each limit holds at 95 %: the usual rule of non-inferiority


def utility(evidence: Evidence, gate: GateConfig, *, arms: Callable[[], Arms], rng: np.random.Generator) -> Verdict:
    """Non-inferiority of AUC: PASS when the lower limit of TSTR - TRTR is above -margin, FAIL when the upper is below.

    `arms` trains the classifiers; it is not called when nothing can be trained.
    """
    control = evidence.control
    reason = impossible(evidence)
    if reason:
        return _verdict(Outcome.INCONCLUSIVE, reason, None, None, gate, {})
    trained = arms()
    tstr, trtr = auc(trained.synthetic, control.labels), auc(trained.real, control.labels)
    low, high = difference_interval(trained.synthetic, trained.real, control.labels, control.rows_of(), rng, confidence_level=_CONFIDENCE)
    text = (
        f"AUC {tstr:.3f} trained on synthetic, {trtr:.3f} on real images, a difference of {tstr - trtr:+.3f} ± {(high - low) / 2:.3f} "
        f"({_CONFIDENCE:.0%}, {control.num_patients} control patients)"
    )
    if low >= -gate.utility_margin:
        outcome, reason = Outcome.PASS, text
    elif high < -gate.utility_margin:
        outcome, reason = Outcome.FAIL, f"{text}: the loss is larger than {gate.utility_margin:g}"
    else:
        outcome, reason = (
            Outcome.INCONCLUSIVE,
            f"{text}: a loss above {gate.utility_margin:g} cannot be excluded",
        )
    return _verdict(outcome, reason, tstr - trtr, (low, high), gate, _figures(evidence, trained, rng))


def _figures(evidence: Evidence, arms: Arms, rng: np.random.Generator) -> dict[str, float]:
    """Of each arm on control patients; what synthetic images add to real ones; whether the synthetic labels are what they look like."""
    control = evidence.control
    figures: dict[str, float] = {}
    for name, probabilities in (("synthetic", arms.synthetic), ("real", arms.real), ("real and synthetic", arms.both)):
        figures |= {
            f"AUC, {name}": auc(probabilities, control.labels),
            f"balanced accuracy, {name}": balanced_accuracy(probabilities, control.labels),
            f"Brier score, {name}": brier(probabilities, control.labels),
            f"calibration error, {name}": calibration_error(probabilities, control.labels),
        }
        figures |= {f"recall of {control.classes[label]}, {name}": value for label, value in recalls(probabilities, control.labels).items()}
    low, high = difference_interval(arms.both, arms.real, control.labels, control.rows_of(), rng, confidence_level=0.95)
    by_formula = auc_difference(arms.synthetic, arms.real, control.labels, control.patients)
    below, above = by_formula.interval(_CONFIDENCE)
    return figures | {
        "AUC difference by DeLong, lower limit": below,
        "AUC difference by DeLong, upper limit": above,
        "AUC difference by DeLong, p of none": by_formula.p,
        "AUC gained by adding synthetic to real, lower limit": low,
        "AUC gained by adding synthetic to real, upper limit": high,
        "label agreement of a classifier of real images, synthetic": balanced_accuracy(arms.synthetic_by_real, evidence.synthetic_labels),
        "label agreement of a classifier of real images, control": balanced_accuracy(arms.real, control.labels),
    }


def difference_interval(
    first: Array, second: Array, labels: Int64, rows_of: list[Int64], rng: np.random.Generator, *, confidence_level: float
) -> tuple[float, float]:
    """Bootstrap over patients of the difference of AUCs of two classifiers, whose probabilities are (n, classes)."""
    differences = []
    for _ in range(_RESAMPLES):
        rows = np.concatenate([rows_of[int(patient)] for patient in rng.integers(len(rows_of), size=len(rows_of))])
        if len(np.unique(labels[rows])) == len(np.unique(labels)):
            differences.append(rank_auc(first[rows], labels[rows]) - rank_auc(second[rows], labels[rows]))
    tail = (1 - confidence_level) / 2
    return float(np.quantile(differences, tail)), float(np.quantile(differences, 1 - tail))


def rank_auc(probabilities: Array, labels: Int64) -> float:
    """`auc` from rank sums, for the many resamples of an interval (Hanley and McNeil 1982)."""
    present = (1,) if probabilities.shape[1] == 2 else np.unique(labels)
    areas = []
    for label in present:
        inside = labels == label
        m = int(inside.sum())
        areas.append((stats.rankdata(probabilities[:, label])[inside].sum() - m * (m + 1) / 2) / (m * (len(labels) - m)))
    return float(np.mean(areas))


def _verdict(
    outcome: Outcome,
    reason: str,
    statistic: float | None,
    interval: tuple[float, float] | None,
    gate: GateConfig,
    figures: dict[str, float],
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
