"""Do synthetic images copy training patients?

On sides of equal size, a synthetic image copies a patient when it is at least `_NEAR` times nearer to one side's nearest patient
than to the other side's, in normalised thumbnails, mirrored or not. Distinct patients are counted: `a` in training, `b` in control.
Without copying, training and control patients are exchangeable, so a given a + b is Binomial(a + b, 1/2). The test repeats over
random control-sized draws of the training patients, because a copied patient may be outside one draw, and takes the doubled median
of the p-values (Meinshausen et al. 2009), which keeps the false-alarm rate.
Screening: an image nearer to a training patient than any two different patients are to each other is shown to a person.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dpsynth.checks.evidence import Evidence, Features
from dpsynth.checks.statistics import clopper_pearson, nearest
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig
from dpsynth.data.cohort import Int64

Array = NDArray[np.float64]
QUESTION = "Do synthetic images lie nearer to training patients than chance allows?"
LIMITATION = (
    "It sees copies of the whole picture, mirrored, brightened or slightly moved; not copied parts, strong distortions, "
    "or copies of fewer than about ten patients in a hundred."
)
_NEAR = 0.5
_DRAWS = 25


def copied_patients(synthetic: Array, first: Array, first_ids: Int64, second: Array, second_ids: Int64) -> tuple[int, int]:
    """Distinct patients of each side that some synthetic image lies much nearer to than to the other side."""
    d_first, row_first = nearest(synthetic, first)
    d_second, row_second = nearest(synthetic, second)
    a = len(set(first_ids[row_first[d_first < _NEAR * d_second]].tolist()))
    b = len(set(second_ids[row_second[d_second < _NEAR * d_first]].tolist()))
    return a, b


def copying_p(
    synthetic: Array, training: Array, training_ids: Int64, control: Array, control_ids: Int64, *, rng: np.random.Generator
) -> tuple[float, float, float]:
    """p-value, and the mean counts of copied patients on the training and on the control side."""
    t, c = np.unique(training_ids), np.unique(control_ids)
    size = min(len(t), len(c))
    results = []
    for _ in range(_DRAWS):
        in_training = np.isin(training_ids, rng.permutation(t)[:size])
        in_control = np.isin(control_ids, rng.permutation(c)[:size])
        a, b = copied_patients(synthetic, training[in_training], training_ids[in_training], control[in_control], control_ids[in_control])
        results.append((float(stats.binom.sf(a - 1, a + b, 0.5)) if a + b else 1.0, a, b))
    values = np.array(results)
    return min(1.0, 2 * float(np.median(values[:, 0]))), float(values[:, 1].mean()), float(values[:, 2].mean())


def copying(evidence: Evidence, features: Features, gate: GateConfig, *, rng: np.random.Generator) -> Verdict:
    """FAIL by the test on distinct patients; FLAG by the screening; INCONCLUSIVE when too few patients could show anything."""
    both = np.concatenate([features.synthetic_thumbnails, features.mirrored_thumbnails])
    arguments = (
        features.training_thumbnails,
        evidence.training.patients,
        features.control_thumbnails,
        evidence.control.patients,
    )
    p, a, b = copying_p(both, *arguments, rng=rng)
    suspicious = _screened(both, features)
    needed = int(np.ceil(np.log2(2 / gate.false_alarm_rate)))
    size = min(evidence.training.num_patients, evidence.control.num_patients)
    low, high = clopper_pearson(round(a), max(round(a + b), 1), 0.95)
    outcome, reason = (
        Outcome.PASS,
        f"no evidence (about {a:.1f} training and {b:.1f} control patients nearer than chance, p {p:.2g}); "
        f"at least {needed} copied patients in a draw of {size} are needed to fail",
    )
    if suspicious:
        outcome = Outcome.FLAG
        reason = f"{suspicious} synthetic images are nearer to a training patient than two patients are to each other: a person must look"
    if size < 4 * needed:
        outcome, reason = (
            Outcome.INCONCLUSIVE,
            f"with {size} patients a side copying could not be seen; at least {4 * needed} are needed",
        )
    if p < gate.false_alarm_rate:
        outcome, reason = (
            Outcome.FAIL,
            f"about {a:.0f} training patients are copied against {b:.0f} control patients (p {p:.2g})",
        )
    return Verdict(
        check="copying",
        question=QUESTION,
        outcome=outcome,
        statistic_name="share of training patients among those approached",
        statistic=a / (a + b) if a + b else 0.5,
        interval=(low, high),
        threshold=0.5,
        confidence_level=0.95,
        false_alarm_rate=gate.false_alarm_rate,
        reason=reason,
        limitation=LIMITATION,
        figures={"p": p, "training patients": a, "control patients": b, "screened images": float(suspicious)},
    )


def _screened(both: Array, features: Features) -> int:
    """Synthetic images nearer to a training patient than the nearest two different patients, training against control."""
    closest_people = float(nearest(features.control_thumbnails, features.training_thumbnails)[0].min())
    distances = nearest(both, features.training_thumbnails)[0].reshape(2, -1).min(axis=0)
    return int((distances < 0.5 * closest_people).sum())
