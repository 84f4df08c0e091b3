"""Can someone who sees only the synthetic images tell who was in training?

Score of a patient: log distance to the nearest reference image minus log distance to the nearest synthetic image, as in DOMIAS (van Breugel
et al. 2023). The reference is a random part of the control patients and is used for both arms alike, so under the null training
and remaining control patients are exchangeable and the rank test is exact.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dpsynth.checks.evidence import Features
from dpsynth.checks.statistics import auc_interval, nearest, smallest_detectable_auc
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig

Array = NDArray[np.float64]
QUESTION = "Can the synthetic images tell training patients from control patients?"
LIMITATION = (
    "It is one attack, from the images alone, on average over patients: single copied patients and stronger attacks can escape it; "
    "the differential privacy bound is what limits those."
)
_REFERENCE_SHARE = 0.3


def scores(patients: Array, synthetic: Array, reference: Array) -> Array:
    """Membership score of each patient's features, (n,); higher means nearer to the synthetic images than expected."""
    to_reference, to_synthetic = nearest(patients, reference)[0], nearest(patients, synthetic)[0]
    return np.asarray(np.log(to_reference + 1e-9) - np.log(to_synthetic + 1e-9))


def arms(control: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Split control features into reference and the arm that is tested."""
    order = rng.permutation(len(control))
    cut = max(1, round(_REFERENCE_SHARE * len(control)))
    return control[order[:cut]], control[order[cut:]]


def membership(features: Features, gate: GateConfig, *, rng: np.random.Generator) -> Verdict:
    """FAIL when the one-sided rank test is significant; INCONCLUSIVE when too few patients could show anything."""
    training = features.training
    reference, control = arms(features.control, rng)
    detectable = smallest_detectable_auc(len(training), max(len(control), 1), false_alarm_rate=gate.false_alarm_rate)
    inside, outside = scores(training, features.synthetic, reference), scores(control, features.synthetic, reference)
    p = float(stats.mannwhitneyu(inside, outside, alternative="greater").pvalue)
    auc, low, high = auc_interval(inside, outside, 0.95)
    if p < gate.false_alarm_rate:
        outcome, reason = (
            Outcome.FAIL,
            f"training patients lie nearer to the synthetic images than control patients (AUC {auc:.3f}, p {p:.2g})",
        )
    elif detectable > gate.largest_membership_auc:
        outcome, reason = (
            Outcome.INCONCLUSIVE,
            f"with {len(control)} control patients only an AUC above {detectable:.2f} could be seen",
        )
    else:
        outcome, reason = (
            Outcome.PASS,
            f"no evidence (AUC {auc:.3f}, p {p:.2g}); an AUC of {detectable:.2f} would have been seen",
        )
    return Verdict(
        check="membership",
        question=QUESTION,
        outcome=outcome,
        statistic_name="AUC of the membership score",
        statistic=auc,
        interval=(low, high),
        threshold=0.5,
        confidence_level=0.95,
        false_alarm_rate=gate.false_alarm_rate,
        reason=reason,
        limitation=LIMITATION,
        figures={"p": p, "smallest detectable AUC": detectable, "training": float(len(inside)), "control": float(len(outside))},
    )
