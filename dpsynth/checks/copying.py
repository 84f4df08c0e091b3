"""Do synthetic images copy training patients?

A synthetic image approaches the patient whom it lies nearest to, with a ratio: that distance as part of the distance to the third nearest
patient. Who is approached and how closely does not depend on the coins that put pool patients into training, so without copying the
approached patients of the pool are inside by fair coins. Distinct patients are counted, at several ratios fixed by how near the pool's own
patients come to each other; the largest excess is compared with that of coins flipped again, which is exact.
How near people come is extrapolated from the better half of what is seen, for each way of comparing by itself: some people are there under
two ids, and nearly empty slices are alike, and the few smallest ratios would say that everything is usual.
Screening: an image that comes much nearer to any patient, of either side, than people come to each other is shown to a person.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom, norm

from dpsynth.checks.evidence import Evidence, Features
from dpsynth.checks.family import strictest
from dpsynth.checks.search import Approaches
from dpsynth.checks.statistics import clopper_pearson, coin_flip_count_p
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig

Array = NDArray[np.float64]
QUESTION = "Do synthetic images lie nearer to training patients than chance allows?"
LIMITATION = (
    "It sees copies of the whole picture or of whole slices of a volume: mirrored, shifted, turned or rescaled a little, brightened or "
    "their contrast stretched; not copied parts, several of these at once, other changes of contrast, or blends of many patients. The "
    "test counts patients of the pool; single copies are left to the screening and a person."
)
_CHANCE = 0.01  # share of people who come so near to others, by any way of comparing
_TRUSTED = 0.1  # quantile of their ratios below which people may be the same person
_PARTS = (0.4, 0.6, 0.8, 1.0)  # of that quantile, at which approached patients are counted
SCREENED = 0.6  # of that quantile, below which a person must look
_PLAIN = SCREENED / 2  # of that quantile: an exact copy that comes so near would still be shown when it is altered, and twice as far
_LEAST_SEEN = 0.5  # share of pool patients of whom an exact copy is plain, below which the check cannot tell
_WAYS = ("whole images", "slices along the first axis", "slices along the second axis", "slices along the third axis")
SCREENED_BELOW = "part of the usual ratio below which a person must look"  # among the figures
_MOST_TO_LOOK_AT = 10, 0.005  # patients, and share of them: more who are approached so closely are no doubtful cases for a person
_POWER = 0.8
_LEAST_SIDES = 4  # times the patients that are needed, on each side of the pool


def copies_needed(level: float) -> int:
    """Distinct pool patients that must be copied, with no control patient approached, for a sign test to reach `level`."""
    return int(np.ceil(np.log2(1 / level)))


def copying(evidence: Evidence, features: Features, gate: GateConfig, *, rng: np.random.Generator) -> Verdict:
    """Accuses by the test on distinct patients; FLAG by the screening, FAIL when it shows more patients than a person should be asked to
    excuse; INCONCLUSIVE when too few patients could show anything."""
    pool, inside = evidence.pool, evidence.inside
    usual = usual_ratios(features.real_approaches)
    found = features.synthetic_approaches.relative_to(usual)
    closest = found.per_patient(evidence.training.num_patients + evidence.control.num_patients)[pool]
    approached = closest[None] < np.array(_PARTS)[:, None]
    p, telling = coin_flip_count_p(approached, inside, rng=rng)
    a, b = int((approached[telling] & inside).sum()), int((approached[telling] & ~inside).sum())
    real = features.real_approaches.relative_to(usual)
    seen = visible(real)
    needed = int(np.ceil(copies_needed(strictest(gate)) / max(seen, _LEAST_SEEN)))
    ratios, nearest = found.per_item(len(evidence.synthetic))
    shown = [int(row) for row in np.argsort(ratios, kind="stable") if ratios[row] < SCREENED]
    ids = (*evidence.training.patient_ids, *evidence.control.patient_ids)
    listed = tuple((row, ids[nearest[row]]) for row in shown)
    counts = f"{a} pool patients in training and {b} outside approached more closely than chance"
    could = (
        f"about {needed} copied pool patients{_all_copied(evidence, needed)} would have been seen by the test, and any image nearer "
        f"than {SCREENED:g} of the usual by the screening{_unseen(real, seen)}"
    )
    outcome, reason = Outcome.PASS, f"no evidence ({counts}, p {p:.2g}); {could}"
    if listed:
        outcome, reason = Outcome.FLAG, f"{_flag(listed, evidence)}; {counts}, p {p:.2g}; {could}"
    least = min(int(inside.sum()), int((~inside).sum()))
    if least < _LEAST_SIDES * needed:
        outcome, reason = (
            Outcome.INCONCLUSIVE,
            f"with {least} pool patients a side copying could not be seen; at least {_LEAST_SIDES * needed} are needed",
        )
    if seen < _LEAST_SEEN:
        too = f"; {len(listed)} images are listed all the same" if listed else ""
        outcome, reason = (
            Outcome.INCONCLUSIVE,
            f"too little could be seen{_unseen(real, seen)}{too}: look for doubles with `dpsynth audit`",
        )
    most = max(_MOST_TO_LOOK_AT[0], int(_MOST_TO_LOOK_AT[1] * len(ids)))
    people = len({patient for _, patient in listed})
    if people > most:
        said = f"{_flag(listed, evidence)}; these are {people} patients, and more than {most} are no doubtful cases"
        outcome, reason = Outcome.FAIL, f"{said}; {counts}, p {p:.2g}; {could}"
    return Verdict(
        check="copying",
        question=QUESTION,
        outcome=outcome,
        statistic_name="share of training patients among approached pool patients",
        statistic=a / (a + b) if a + b else None,
        interval=clopper_pearson(a, a + b, 0.95) if a + b else None,
        threshold=None,
        confidence_level=0.95,
        false_alarm_rate=gate.family_error,
        reason=reason,
        limitation=LIMITATION,
        figures={
            "approached, in training": float(a),
            "approached, outside": float(b),
            "ratio counted, as part of the usual": _PARTS[telling],
            "usual ratio of whole images": float(usual[0]),
            "pool patients of whom a copy is counted": seen,
            "copied pool patients needed": float(needed),
            "screened images": float(len(listed)),
            SCREENED_BELOW: SCREENED,
        },
        p_value=p,
        accusation=f"training patients are copied: {counts}; {could}",
        listed=listed,
        ratios=tuple(ratios[shown].tolist()),
    )


def usual_ratios(real: Approaches) -> Array:
    """For each way of comparing (kinds,) the ratio below which _CHANCE of people, over all ways, come to each other.

    Their logarithms are taken for normal below the median, with the scale that the quantile _TRUSTED gives: up to a tenth of twins moves
    it little, and where more are alike the ratio falls until no copy can be seen, which `visible` says.
    """
    kinds, people = int(real.kind.max()) + 1, int(real.item.max()) + 1
    usual = []
    for kind in range(kinds):
        ratios = np.log(real.where(real.kind == kind).per_item(people)[0])
        median, low = np.quantile(ratios, (0.5, _TRUSTED))
        usual.append(np.exp(median + (low - median) * norm.ppf(_CHANCE / kinds) / norm.ppf(_TRUSTED)))
    return np.array(usual)


def visible(relative: Approaches) -> float:
    """Share of pool patients of whom an exact copy would be plain, from how near they come to each other, relative to the usual."""
    smallest = np.full(int(relative.item.max()) + 1, np.inf)
    np.minimum.at(smallest, relative.item, relative.copy)
    return float((smallest < _PLAIN).mean())


def _unseen(real: Approaches, seen: float) -> str:
    """What could not be told, by patients and by ways of comparing."""
    patients = f"; of {1 - seen:.0%} of the pool patients no copy could be told, since others are as alike" if seen < 1 else ""
    ways = [name for kind, name in enumerate(_WAYS) if kind <= real.kind.max() and visible(real.where(real.kind == kind)) < _LEAST_SEEN]
    return patients + (f"; nothing could be told by {', '.join(ways)}, which are too alike" if ways and seen >= _LEAST_SEEN else "")


def _all_copied(evidence: Evidence, needed: int) -> str:
    """How many of all training patients, whoever they are, must be copied so that with power 0.8 that many are of the pool."""
    patients, pool = evidence.training.num_patients, int(evidence.inside.sum())
    copied = np.arange(needed, patients + 1)
    enough = copied[hypergeom.sf(needed - 1, patients, pool, copied) >= _POWER]
    return f", or with probability {_POWER:g} {enough[0]} among all of training," if len(enough) else ""


def _flag(listed: tuple[tuple[int, str], ...], evidence: Evidence) -> str:
    controls = set(evidence.control.patient_ids)
    control = sum(patient in controls for _, patient in listed)
    numbers = ", ".join(str(image) for image, _ in listed[:5]) + (", ..." if len(listed) > 5 else "")
    leak = f"; {control} of them resemble control patients, who were never to be trained on" if control else ""
    return f"{len(listed)} synthetic images ({numbers}) are nearer to a patient than people are to each other: a person must look{leak}"
