"""Are the images as good for every subgroup as they are on average? Noise hits small groups hardest, so each is asked about.

Subgroups are the values of the declared attributes and the crossings of two of them. Own few lines instead of fairlearn's MetricFrame: the
intervals must be by patient, and it gives point estimates alone and brings pandas.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsynth.checks.arms import Arms, impossible
from dpsynth.checks.delong import auc_difference
from dpsynth.checks.evidence import Evidence, Features
from dpsynth.checks.statistics import clopper_pearson, in_balls, neighbourhoods
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig
from dpsynth.data.cohort import ImageSet

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]
QUESTION = "Are the synthetic images as useful for every subgroup as the policy asks of them on average?"
LIMITATION = (
    "It compares declared attributes only, on this site's control patients; a group with too few of them is named and not judged, and that "
    "is where differential privacy costs most."
)
SMALLEST_GROUP = 20  # control patients, and at least `SMALLEST_CLASS` of each class among their images
SMALLEST_CLASS = 5
LEAST_SHARE = 0.5  # of a group's share among the training images, below which it is missing among the synthetic ones
_FAMILY_CONFIDENCE = 0.95
_RULES = 2  # loss and missing: each has half of what the family may err
_FEWEST_NEIGHBOURS = 12


@dataclass(frozen=True, kw_only=True)
class Subgroup:
    """Rows of a group among the control, the training and the synthetic images."""

    name: str
    control: Bools
    training: Bools
    synthetic: Bools


def subgroups(evidence: Evidence) -> list[Subgroup]:
    """Every value of every declared attribute, and every crossing of two, that any image has."""
    names = list(evidence.synthetic_attributes)
    synthetic = {name: np.asarray(values) for name, values in evidence.synthetic_attributes.items()}
    control, training = ({name: _values(side, name) for name in names} for side in (evidence.control, evidence.training))
    found = []
    for chosen in (*((name,) for name in names), *itertools.combinations(names, 2)):
        seen = [sorted({*synthetic[name], *control[name], *training[name]}) for name in chosen]
        for values in itertools.product(*seen):
            wanted = dict(zip(chosen, values, strict=True))
            name = ", ".join(f"{key} {value}" for key, value in wanted.items())
            rows = [_rows(side, wanted) for side in (control, training, synthetic)]
            found.append(Subgroup(name=name, control=rows[0], training=rows[1], synthetic=rows[2]))
    return found


def _values(images: ImageSet, name: str) -> NDArray[np.str_]:
    return np.array([mapping.get(name, "") for mapping in images.attributes])


def _rows(columns: Mapping[str, NDArray[np.str_]], wanted: Mapping[str, str]) -> Bools:
    return np.asarray(np.logical_and.reduce([columns[name] == value for name, value in wanted.items()]), dtype=np.bool_)


def fairness(evidence: Evidence, features: Features, gate: GateConfig, *, arms: Callable[[], Arms]) -> Verdict:
    """FLAG when the loss of AUC in some group is surely above the policy's margin, the intervals widened for the number of groups, or
    when a group is surely drawn less than half as often as it was trained on; PASS when it surely is not in any judged group;
    INCONCLUSIVE between, without attributes and without a group that can be judged. Each of the two rules errs in at most half of the
    stated rate, over all groups. The worst group is named at the site."""
    groups = subgroups(evidence)
    if not groups or impossible(evidence):
        return _verdict(Outcome.INCONCLUSIVE, impossible(evidence) or "no attribute is declared, so no subgroup is known", gate, {})
    figures: dict[str, float] = {}
    judged: dict[str, tuple[float, float, float]] = {}
    small = [group.name for group in groups if not _large_enough(group, evidence)]
    confidence = _confidence(len(groups) - len(small))
    for group in groups:
        figures |= {f"{group.name}: {key}": value for key, value in _described(group, evidence, features, arms()).items()}
        if group.name not in small:
            judged[group.name] = _loss(group, evidence, arms(), confidence)
            figures |= {
                f"{group.name}: {key}": v for key, v in zip(("AUC gap", "AUC gap, low", "AUC gap, high"), judged[group.name], strict=True)
            }
    missing = _missing(groups, evidence)
    left_out = f". Groups too small to be judged: {'; '.join(small)}" if small else ""
    left_out += f". Groups drawn less than half as often as among training images: {'; '.join(missing)}" if missing else ""
    if not judged:
        outcome = Outcome.FLAG if missing else Outcome.INCONCLUSIVE
        few = f"no subgroup has {SMALLEST_GROUP} control patients and {SMALLEST_CLASS} images of each class"
        return _verdict(outcome, f"{few}{left_out}", gate, figures, small)
    worst = min(judged, key=lambda name: judged[name][0])
    gap, low, high = judged[worst]
    widest = max((upper - lower) / 2 for _, lower, upper in judged.values())
    surely = [name for name, (_, _, upper) in judged.items() if upper < -gate.utility_margin]
    unsure = [name for name, (_, lower, _) in judged.items() if lower < -gate.utility_margin and name not in surely]
    reason = f"Loss above {gate.utility_margin:g} for: {'; '.join(surely)}. " if surely else ""
    reason += f"Loss above {gate.utility_margin:g} cannot be excluded for: {'; '.join(unsure)}. " if unsure else ""
    reason += f"Worst subgroup {worst}: AUC {gap:+.3f} against real images ({low:+.3f} to {high:+.3f})"
    reason += f". The difference is known to ± {widest:.3f} or better in all {len(judged)} groups that were judged{left_out}"
    outcome = Outcome.FLAG if surely or missing else Outcome.INCONCLUSIVE if unsure else Outcome.PASS
    return _verdict(outcome, reason, gate, figures, small, worst=judged[worst])


def _confidence(number: int) -> float:
    """Of the interval of each of `number` groups in one of the two rules."""
    return 1 - (1 - _FAMILY_CONFIDENCE) / _RULES / max(1, number)


def _large_enough(group: Subgroup, evidence: Evidence) -> bool:
    patients = len(np.unique(evidence.control.patients[group.control]))
    counts = np.bincount(evidence.control.labels[group.control], minlength=len(evidence.control.classes))
    return patients >= SMALLEST_GROUP and int(counts.min()) >= SMALLEST_CLASS


def _missing(groups: list[Subgroup], evidence: Evidence) -> list[str]:
    """Groups that are not small among patients and surely drawn less than half as often as they were trained on."""
    common = [g for g in groups if len(np.unique(evidence.control.patients[g.control])) >= SMALLEST_GROUP]
    upper = {g.name: clopper_pearson(int(g.synthetic.sum()), len(g.synthetic), _confidence(len(common)))[1] for g in common}
    return [g.name for g in common if upper[g.name] < LEAST_SHARE * _share(g, evidence)]


def _share(group: Subgroup, evidence: Evidence) -> float:
    """Of the training patients, each of whom counts once however many images they have: so the generator learnt the shares."""
    patients = evidence.training.patients
    return float((group.training / np.bincount(patients)[patients]).sum() / evidence.training.num_patients)


def _loss(group: Subgroup, evidence: Evidence, arms: Arms, confidence: float) -> tuple[float, float, float]:
    """Difference of AUC with its interval by formula: so far out as many groups make it, resamples have no quantiles."""
    rows = np.flatnonzero(group.control)
    found = auc_difference(arms.synthetic[rows], arms.real[rows], evidence.control.labels[rows], evidence.control.patients[rows])
    return found.estimate, *found.interval(confidence)


def _described(group: Subgroup, evidence: Evidence, features: Features, arms: Arms) -> dict[str, float]:
    """Numbers, shares, whether the labels are what they look like, and precision and coverage beside real images of the group.

    Intervals are of what the generator, or the hospital, would give without end, with the control patients of the neighbourhoods and the
    classifiers as they are: its images, and patients, are independent.
    """
    first_control, first_training = (np.array([rows[0] for rows in side.rows_of()]) for side in (evidence.control, evidence.training))
    control, training = features.control[group.control[first_control]], features.training[group.training[first_training]]
    synthetic = features.synthetic[group.synthetic]
    figures = {
        "control patients": float(len(np.unique(evidence.control.patients[group.control]))),
        "share of synthetic images": float(group.synthetic.mean()),
        "share of training images": float(group.training.mean()),
    }
    if group.synthetic.any():
        agrees = arms.synthetic_by_real.argmax(axis=1)[group.synthetic] == evidence.synthetic_labels[group.synthetic]
        figures |= _rate("label agreement, synthetic", agrees)
    if group.control[first_control].any():
        rows = first_control[group.control[first_control]]  # one image a patient, as those of one patient are not independent
        figures |= _rate("label agreement, real", arms.real.argmax(axis=1)[rows] == evidence.control.labels[rows])
    size = min(len(control), len(training), len(synthetic))
    if size >= _FEWEST_NEIGHBOURS:
        figures |= _rate("precision, synthetic", in_balls(control, synthetic))
        figures |= _rate("precision, real", in_balls(control, training))
        figures["coverage, synthetic"] = neighbourhoods(control[:size], synthetic[:size]).coverage
        figures["coverage, real"] = neighbourhoods(control[:size], training[:size]).coverage
    return figures


def _rate(name: str, seen: Bools) -> dict[str, float]:
    low, high = clopper_pearson(int(seen.sum()), len(seen), _FAMILY_CONFIDENCE)
    return {name: float(seen.mean()), f"{name}, low": low, f"{name}, high": high}


def _verdict(
    outcome: Outcome,
    reason: str,
    gate: GateConfig,
    figures: dict[str, float],
    small: Sequence[str] = (),
    worst: tuple[float, float, float] | None = None,
) -> Verdict:
    return Verdict(
        check="fairness",
        question=QUESTION,
        outcome=outcome,
        statistic_name="AUC trained on synthetic minus AUC trained on real, worst subgroup",
        statistic=worst[0] if worst else None,
        interval=worst[1:] if worst else None,
        threshold=-gate.utility_margin,
        confidence_level=_FAMILY_CONFIDENCE,
        false_alarm_rate=(1 - _FAMILY_CONFIDENCE) / 2,
        reason=reason,
        limitation=LIMITATION,
        figures=figures,
        not_judged=tuple(small),
    )
