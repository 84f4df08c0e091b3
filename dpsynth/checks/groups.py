"""Is anybody worse off than the average? Membership of the most isolated pool patients and of subgroups, chosen from real images alone.

Crossings of the label with each attribute are groups too, where they are large enough to show the AUC that the policy asks about: smaller
ones cost the others power and could show nothing. Simulated (400 repetitions, label and two or four attributes in halves, a leak that the
other groups would show with a probability of nine in ten): a leak in one crossing alone is found in 93 % instead of 80 % at 1,000 pool
patients and in 97 % instead of 86 % at 2,000, one in a value or a label in 94 % instead of 95 %; at 400 none is large enough.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dpsynth.checks.evidence import Bool, Evidence, Features
from dpsynth.checks.family import strictest
from dpsynth.checks.membership import Attack, attack
from dpsynth.checks.statistics import nearest, smallest_detectable_auc
from dpsynth.checks.verdict import Outcome, Verdict
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
    for values in (_labels(evidence), *_attributes(evidence).values()):
        found |= values
    return {name: rows for name, rows in found.items() if not rows.all()}  # the whole pool is the question of membership


def crossings_of(evidence: Evidence, others: Mapping[str, Bool], *, level: float, largest_auc: float) -> dict[str, Bool]:
    """Patients of the pool (n,) in each crossing of a label with a value of an attribute that could show an AUC of `largest_auc` if all
    of them were tested beside the `others`. By numbers of patients, whatever the coins."""
    values = {name: rows for found in _attributes(evidence).values() for name, rows in found.items()}
    pairs = itertools.product(_labels(evidence).items(), values.items())
    crossed = {f"{label}, {value}": np.asarray(ours & theirs) for (label, ours), (value, theirs) in pairs}
    strict = level / max(1, len(others) + len(crossed))

    def enough(count: int) -> bool:
        return count >= _FEWEST and smallest_detectable_auc(count // 2, count - count // 2, false_alarm_rate=strict) <= largest_auc

    new = {name: rows for name, rows in crossed.items() if not any(np.array_equal(rows, other) for other in others.values())}
    return {name: rows for name, rows in new.items() if enough(int(rows.sum()))}


def _labels(evidence: Evidence) -> dict[str, Bool]:
    rows = evidence.first_rows
    labels = [images.classes[int(images.labels[row])] for images, row in (rows[number] for number in evidence.pool)]
    return {f"label {value}": np.array([label == value for label in labels]) for value in sorted(set(labels))}


def _attributes(evidence: Evidence) -> dict[str, dict[str, Bool]]:
    """By attribute of two to eight values, and by value."""
    rows = evidence.first_rows
    chosen = [rows[number] for number in evidence.pool]
    found: dict[str, dict[str, Bool]] = {}
    for name in sorted({name for images, row in chosen for name in images.attributes[row]}):
        values = [images.attributes[row].get(name, "") for images, row in chosen]
        if 2 <= len(set(values)) <= _MOST_VALUES:
            found[name] = {f"{name} {value or 'unknown'}": np.array([v == value for v in values]) for value in sorted(set(values))}
    return found


def groups(evidence: Evidence, features: Features, gate: GateConfig, *, scores: Callable[[], Array], rng: np.random.Generator) -> Verdict:
    """FLAG by Holm when a group's patients can be found, Bonferroni over groups; INCONCLUSIVE when no group could have shown an AUC as the
    policy asks about; PASS names the worst and what could not be tested.

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
    every |= crossings_of(evidence, every, level=level, largest_auc=gate.largest_membership_auc)
    large = {name: rows for name, rows in every.items() if _testable(rows, inside)}
    results = {
        name: attack(of_pool[rows], inside[rows], delta=evidence.delta, level=level / len(large), rng=rng) for name, rows in large.items()
    }
    small = sorted(every.keys() - large.keys())
    verdict = replace(verdict, not_judged=tuple(small))
    left_out = f"; too small to test: {'; '.join(small)}" if small else ""
    if not results:
        return replace(verdict, outcome=Outcome.INCONCLUSIVE, reason=f"no group is large enough to be tested{left_out}")
    worst, best = min(results, key=lambda name: (results[name].p, -results[name].auc)), min(r.detectable for r in results.values())
    found = results[worst]
    text = f"worst is {worst} with {int(large[worst].sum())} pool patients: AUC {found.auc:.3f}"
    seen = f"there an AUC of {min(found.detectable, 1.0):.2f} would have been seen, in the best-tested group one of {min(best, 1.0):.2f}"
    verdict = replace(
        verdict,
        reason=f"no evidence in {len(results)} groups; {text}; {seen}{left_out}",
        statistic=found.auc,
        interval=(found.low, found.high),
        figures=_figures(results, large),
        p_value=min(1.0, found.p * len(results)),
        accusation=f"a group is easier to find than chance allows: {text}; {seen}{left_out}; a person must look",
    )
    if best > gate.largest_membership_auc:
        few = f"in none of {len(results)} groups could an AUC of {gate.largest_membership_auc:g} have been seen; {text}; {seen}{left_out}"
        return replace(verdict, outcome=Outcome.INCONCLUSIVE, reason=few)
    return verdict


def _figures(results: Mapping[str, Attack], large: Mapping[str, Bool]) -> dict[str, float]:
    figures = {f"AUC, {name}": result.auc for name, result in results.items()}
    figures |= {f"smallest detectable AUC, {name}": result.detectable for name, result in results.items()}
    return figures | {f"patients, {name}": float(large[name].sum()) for name in results}


def _testable(rows: Bool, inside: Bool) -> bool:
    sides = int((rows & inside).sum()), int((rows & ~inside).sum())
    return sum(sides) >= _FEWEST and min(sides) >= _FEWEST_A_SIDE
