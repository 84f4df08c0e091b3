"""The statistical privacy checks as one family: together they accuse without cause with probability at most `family_error` (Holm 1979)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dpsynth.checks.verdict import Outcome, Verdict

FAMILY = ("mechanism", "membership", "copying", "groups")
_ACCUSED = {"groups": Outcome.FLAG}  # reported to a person; the others fail


def strictest(family_error: float) -> float:
    """The level that the smallest p-value must reach: what a check can rely on to see, whatever the others find."""
    return family_error / len(FAMILY)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values by name: one at most the family error means that Holm's procedure rejects."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def decide_family(verdicts: Sequence[Verdict], family_error: float) -> tuple[Verdict, ...]:
    """The verdicts after Holm. One without a p-value (it broke, or had nothing to test) keeps its place in the family."""
    known = {verdict.check: verdict.p_value for verdict in verdicts if verdict.check in FAMILY}
    adjusted = holm({name: 1.0 if (p := known.get(name)) is None else p for name in FAMILY})
    return tuple(_decided(verdict, adjusted.get(verdict.check, 1.0), family_error) for verdict in verdicts)


def _decided(verdict: Verdict, adjusted: float, family_error: float) -> Verdict:
    if verdict.p_value is None:
        return verdict
    figures = {**verdict.figures, "p": verdict.p_value, "p after Holm": adjusted}
    if adjusted > family_error:
        return replace(verdict, figures=figures)
    outcome = _ACCUSED.get(verdict.check, Outcome.FAIL)
    return replace(
        verdict, outcome=outcome, reason=f"{verdict.accusation} (p {verdict.p_value:.2g}, after Holm {adjusted:.2g})", figures=figures
    )
