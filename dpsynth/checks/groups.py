"""Is anybody worse off than the average? Membership of the most isolated pool patients and of subgroups, chosen from real images alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dpsynth.checks.evidence import Bool, Evidence, Features
from dpsynth.checks.family import strictest
from dpsynth.checks.membership import attack
from dpsynth.checks.statistics import nearest
from dpsynth.checks.verdict import Verdict
from dpsynth.config import GateConfig

Array = NDArray[np.float64]
QUESTION = "Are unusual patients or a subgroup easier to find than others?"
LIMITATION = (
    "Groups below 20 pool patients are not tested and small ones hardly: differential privacy costs them most in quality, and it is "
    "the bound on epsilon, not this check, that protects the most unusual patient."
)
ISOLATED = "most isolated tenth"
_FEWEST, _FEWEST_A_SIDE, _MOST_VALUES = 20, 5, 8


def groups_of(evidence: Evidence, features: Features) -> dict[str, Bool]:
    """Which patients of the pool (n,) are in each group: by isolation among real patients, label, and attributes of few values."""
    pool, real = evidence.pool, np.concatenate([features.training, features.control])
    isolation = nearest(real[pool], real, own=pool)[0]
    size = max(min(_FEWEST, len(pool)), round(0.1 * len(pool)))
    found = {ISOLATED: np.asarray(isolation >= np.sort(isolation)[-size])}
    rows = evidence.first_rows
    chosen = [rows[number] for number in pool]
    labels = [images.classes[int(images.labels[row])] for images, row in chosen]
    found |= {f"label {value}": np.array([label == value for label in labels]) for value in sorted(set(labels))}
    names = sorted({name for images, row in chosen for name in images.attributes[row]})
    for name in names:
        values = [images.attributes[row].get(name, "") for images, row in chosen]
        if 2 <= len(set(values)) <= _MOST_VALUES:
            found |= {f"{name} {value or 'unknown'}": np.array([v == value for v in values]) for value in sorted(set(values))}
    return {name: rows for name, rows in found.items() if not rows.all()}  # the whole pool is the question of membership


def groups(evidence: Evidence, features: Features, gate: GateConfig, *, scores: Callable[[], Array], rng: np.random.Generator) -> Verdict:
    """FLAG by Holm when a group's patients can be found, Bonferroni over groups; PASS names the worst and what could not be tested.

    `scores` computes `pool_scores` of the membership check.
    """
    blank = Verdict.nothing_found(
        "groups",
        question=QUESTION,
        statistic_name="AUC of the membership score in the worst group",
        limitation=LIMITATION,
        false_alarm_rate=gate.family_error,
    )
    verdict = replace(blank, p_value=1.0)
    of_pool, inside, level = scores(), evidence.inside, strictest(gate)
    every = groups_of(evidence, features)
    large = {name: rows for name, rows in every.items() if _testable(rows, inside)}
    results = {
        name: attack(of_pool[rows], inside[rows], delta=evidence.delta, level=level / len(large), rng=rng) for name, rows in large.items()
    }
    small = sorted(every.keys() - large.keys())
    verdict = replace(verdict, not_judged=tuple(small))
    left_out = f"; too small to test: {', '.join(small)}" if small else ""
    if not results:
        return replace(verdict, reason=f"no group is large enough to be tested{left_out}")
    worst = min(results, key=lambda name: (results[name].p, -results[name].auc))
    found = results[worst]
    text = f"worst is {worst} with {int(large[worst].sum())} pool patients: AUC {found.auc:.3f}"
    figures = {f"AUC, {name}": result.auc for name, result in results.items()}
    figures |= {f"patients, {name}": float(large[name].sum()) for name in results}
    seen = f"there an AUC of {min(found.detectable, 1.0):.2f} would have been seen"
    return replace(
        verdict,
        reason=f"no evidence in {len(results)} groups; {text}; {seen}{left_out}",
        statistic=found.auc,
        interval=(found.low, found.high),
        figures=figures,
        p_value=min(1.0, found.p * len(results)),
        accusation=f"a group is easier to find than chance allows: {text}; a person must look",
    )


def _testable(rows: Bool, inside: Bool) -> bool:
    sides = int((rows & inside).sum()), int((rows & ~inside).sum())
    return sum(sides) >= _FEWEST and min(sides) >= _FEWEST_A_SIDE
