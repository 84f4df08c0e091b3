"""Do synthetic images copy training patients?

A synthetic image approaches the patient whom it lies nearest to, with a ratio: that distance as part of the distance to the nearest other
patient. Who is approached and how closely does not depend on the coins that put pool patients into training, so without copying the
approached patients of the pool are inside by fair coins. Distinct patients are counted, at several ratios fixed by how near the pool's own
patients come to each other; the largest excess is compared with that of coins flipped again, which is exact.
Screening: an image that comes much nearer to any patient, of either side, than people come to each other is shown to a person.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpsynth.checks.evidence import Evidence, Features
from dpsynth.checks.family import strictest
from dpsynth.checks.statistics import clopper_pearson, coin_flip_count_p
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig

Array = NDArray[np.float64]
QUESTION = "Do synthetic images lie nearer to training patients than chance allows?"
LIMITATION = (
    "It sees copies of the whole picture or of whole slices of a volume: mirrored, shifted, turned or rescaled a little, brightened; not "
    "copied parts, strong distortions or blends of many patients. The test counts patients of the pool; single copies are left to the "
    "screening and a person."
)
_CHANCE = 0.01  # quantile of the ratios of people to each other
_PARTS = (0.4, 0.6, 0.8, 1.0)  # of that quantile, at which approached patients are counted
SCREENED = 0.6  # of that quantile, below which a person must look
_LEAST_SIDES = 4  # times the patients that are needed, on each side of the pool


def copies_needed(level: float) -> int:
    """Distinct pool patients that must be copied, with no control patient approached, for a sign test to reach `level`."""
    return int(np.ceil(np.log2(1 / level)))


def copying(evidence: Evidence, features: Features, gate: GateConfig, *, rng: np.random.Generator) -> Verdict:
    """Accuses by the test on distinct patients; FLAG by the screening; INCONCLUSIVE when too few patients could show anything."""
    pool, inside = evidence.pool, evidence.inside
    chance = float(np.quantile(features.real_ratios, _CHANCE))
    closest = features.synthetic_approaches.per_patient(evidence.training.num_patients + evidence.control.num_patients)[pool]
    approached = closest[None] < chance * np.array(_PARTS)[:, None]
    p, telling = coin_flip_count_p(approached, inside, rng=rng)
    a, b = int((approached[telling] & inside).sum()), int((approached[telling] & ~inside).sum())
    needed = copies_needed(strictest(gate))
    listed = screened(evidence, features)
    counts = f"{a} pool patients in training and {b} outside approached more closely than chance"
    seen = (
        f"about {needed} copied pool patients, {_all_copied(evidence, needed)} among all of training, would have been seen by the test, "
        f"and any image nearer than {SCREENED * chance:.2f} of the distance to the next patient by the screening"
    )
    outcome, reason = Outcome.PASS, f"no evidence ({counts}, p {p:.2g}); {seen}"
    if listed:
        outcome, reason = Outcome.FLAG, f"{_flag(listed, evidence)}; {counts}, p {p:.2g}; {seen}"
    least = min(int(inside.sum()), int((~inside).sum()))
    if least < _LEAST_SIDES * needed:
        outcome, reason = (
            Outcome.INCONCLUSIVE,
            f"with {least} pool patients a side copying could not be seen; at least {_LEAST_SIDES * needed} are needed",
        )
    low, high = clopper_pearson(a, max(a + b, 1), 0.95)
    return Verdict(
        check="copying",
        question=QUESTION,
        outcome=outcome,
        statistic_name="share of training patients among approached pool patients",
        statistic=a / (a + b) if a + b else 0.5,
        interval=(low, high) if a + b else (0.0, 1.0),
        threshold=0.5,
        confidence_level=0.95,
        false_alarm_rate=gate.family_error,
        reason=reason,
        limitation=LIMITATION,
        figures={
            "approached, in training": float(a),
            "approached, outside": float(b),
            "ratio counted": chance * _PARTS[telling],
            "copied pool patients needed": float(needed),
            "screened images": float(len(listed)),
        },
        p_value=p,
        accusation=f"training patients are copied: {counts}; {seen}",
        listed=listed,
    )


def screened(evidence: Evidence, features: Features) -> tuple[tuple[int, str], ...]:
    """Synthetic images (by number) that come much nearer to a patient than people come to each other, with that patient; closest first."""
    ratios, patients = features.synthetic_approaches.per_item(len(evidence.synthetic))
    limit = SCREENED * float(np.quantile(features.real_ratios, _CHANCE))
    ids = (*evidence.training.patient_ids, *evidence.control.patient_ids)
    return tuple((int(row), ids[patients[row]]) for row in np.argsort(ratios, kind="stable") if ratios[row] < limit)


def _all_copied(evidence: Evidence, needed: int) -> int:
    """How many of all training patients are copied when that many of the pool are."""
    return int(np.ceil(needed * evidence.training.num_patients / max(int(evidence.in_pool.sum()), 1)))


def _flag(listed: tuple[tuple[int, str], ...], evidence: Evidence) -> str:
    control = sum(patient in set(evidence.control.patient_ids) for _, patient in listed)
    numbers = ", ".join(str(image) for image, _ in listed[:5]) + (", ..." if len(listed) > 5 else "")
    leak = f"; {control} of them resemble control patients, who were never to be trained on" if control else ""
    return f"{len(listed)} synthetic images ({numbers}) are nearer to a patient than people are to each other: a person must look{leak}"
