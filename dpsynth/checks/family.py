"""The statistical privacy checks as one family: together they accuse without cause with probability at most `family_error` (Holm 1979).

Attributes and white_box belong to it when the policy requires them. When it does not, they are decided alone, at a strict level, and can
only send the release to a person: a policy that leaves them out keeps the power of the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig

FAMILY = ("mechanism", "membership", "copying", "groups")
ON_REQUEST = ("attributes", "white_box")
ALWAYS_REQUIRED = ("accounting", "mechanism", "membership", "copying")  # no policy can do without them
ALONE = 0.01  # level of a check on request that the policy does not require
_ACCUSED = {"groups": Outcome.FLAG}  # reported to a person; the others fail


def needed(required: Collection[str]) -> tuple[str, ...]:
    """The checks that must pass under a policy that requires these."""
    return tuple(dict.fromkeys((*ALWAYS_REQUIRED, *required)))


def members(required: Collection[str]) -> tuple[str, ...]:
    """The family under a policy that requires these checks."""
    return (*FAMILY, *(name for name in ON_REQUEST if name in required))


def strictest(gate: GateConfig) -> float:
    """The level that the smallest p-value must reach: what a check can rely on to see, whatever the others find."""
    return gate.family_error / len(members(gate.required))


def relied_on(check: str, gate: GateConfig) -> float:
    """The level at which a check of the family or on request sees, whatever the others find."""
    return strictest(gate) if check in members(gate.required) else ALONE


def false_alarms(check: str, gate: GateConfig) -> float:
    """Stated false-alarm rate: of the whole family, or of a check that is decided alone."""
    return gate.family_error if check in members(gate.required) else ALONE


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values by name: one at most the family error means that Holm's procedure rejects."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def decide_family(verdicts: Sequence[Verdict], family_error: float, *, family: Sequence[str] = FAMILY) -> tuple[Verdict, ...]:
    """The verdicts after Holm. One without a p-value (it broke, or had nothing to test) keeps its place in the family."""
    known = {verdict.check: verdict.p_value for verdict in verdicts if verdict.check in family}
    adjusted = holm({name: 1.0 if (p := known.get(name)) is None else p for name in family})
    return tuple(
        _decided(verdict, adjusted[verdict.check], family_error) if verdict.check in family else _alone(verdict) for verdict in verdicts
    )


def _decided(verdict: Verdict, adjusted: float, family_error: float) -> Verdict:
    verdict = replace(verdict, family=True)
    if verdict.p_value is None:
        return verdict
    figures = {**verdict.figures, "p": verdict.p_value, "p after Holm": adjusted}
    if adjusted > family_error:
        return replace(verdict, figures=figures)
    outcome = _ACCUSED.get(verdict.check, Outcome.FAIL)
    return replace(
        verdict, outcome=outcome, reason=f"{verdict.accusation} (p {verdict.p_value:.2g}, after Holm {adjusted:.2g})", figures=figures
    )


def _alone(verdict: Verdict) -> Verdict:
    if verdict.p_value is None or verdict.check not in ON_REQUEST:
        return verdict
    figures = {**verdict.figures, "p": verdict.p_value}
    if verdict.p_value > ALONE:
        return replace(verdict, figures=figures)
    reason = f"{verdict.accusation} (p {verdict.p_value:.2g}, decided alone at {ALONE:g}); a person must look"
    return replace(verdict, outcome=Outcome.FLAG, reason=reason, figures=figures)
