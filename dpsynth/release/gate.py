"""The gate: a pure function that allows or refuses a release as a whole. No files, no clock, no chance. It fails closed.

Single images are never left out because they resemble a patient: that choice would depend on the private data outside the accounting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpsynth.checks.family import needed
from dpsynth.checks.verdict import REVIEW, Outcome, Verdict
from dpsynth.privacy.guarantee import Guarantee
from dpsynth.privacy.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Every reason, not only the first."""

    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """Permission for exactly the candidates with this digest. Only `decide` makes one."""

    candidates_sha256: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """Everything the gate looks at. reviews: check name to who accepted its flag and why."""

    guarantee: Guarantee
    booked: tuple[Mechanism, ...]  # what the ledger charged for this run
    budget_epsilon: float  # of the data owner, over all runs
    spent_epsilon: float  # over all runs, at the delta of the budget
    configured_epsilon: float
    ledger_problems: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    required: tuple[str, ...]
    attempt: int
    max_attempts: int
    checked_sha256: str
    candidates_sha256: str
    reviews: Mapping[str, str]
    refusal: str = ""  # who refused these very images and why, as the ledger has it


def decide(question: Question) -> Allowed | Refused:
    """Allow only when nothing speaks against it."""
    reasons = [
        *_claim_reasons(question),
        *_check_reasons(question.verdicts, question.required, question.reviews),
        *_attempt_reasons(question),
    ]
    return Refused(reasons=tuple(reasons)) if reasons else Allowed(candidates_sha256=question.candidates_sha256)


def _claim_reasons(question: Question) -> list[str]:
    guarantee, reasons = question.guarantee, []
    if not math.isfinite(guarantee.epsilon):
        reasons.append("epsilon is infinite: there is no privacy guarantee")
    else:
        reasons += list(guarantee.problems())
        if not guarantee.epsilon <= question.configured_epsilon * (1 + 1e-6):
            reasons.append(f"epsilon {guarantee.epsilon:.4g} is above the {question.configured_epsilon:g} of the configuration")
    if guarantee.mechanisms != question.booked:
        reasons.append("the ledger booked other mechanisms for this run than the guarantee names")
    if not question.spent_epsilon <= question.budget_epsilon * (1 + 1e-6) or not math.isfinite(question.spent_epsilon):
        reasons.append(f"all runs together cost epsilon {question.spent_epsilon:.4g}, the data owner allows {question.budget_epsilon:g}")
    return reasons + [f"ledger: {problem}" for problem in question.ledger_problems]


def _check_reasons(verdicts: Sequence[Verdict], required: Sequence[str], reviews: Mapping[str, str]) -> list[str]:
    reasons = []
    must_pass = needed(required)
    missing = sorted({*must_pass} - {verdict.check for verdict in verdicts})
    reasons += [f"the required check {name!r} has not run" for name in missing]
    for verdict in verdicts:
        if verdict.check in must_pass and verdict.outcome in (Outcome.FAIL, Outcome.INCONCLUSIVE):
            reasons.append(f"{verdict.check}: {verdict.outcome.value}")
        if verdict.outcome is Outcome.FLAG and not reviews.get(verdict.check, "").strip():
            reasons.append(f"{verdict.check}: flagged, and nobody has accepted it (look at check/{REVIEW} first)")
    return reasons


def _attempt_reasons(question: Question) -> list[str]:
    reasons = [f"these images were refused by a person ({question.refusal}); draw or train again"] if question.refusal else []
    if not 1 <= question.attempt <= question.max_attempts:
        reasons.append(f"attempt {question.attempt} of {question.max_attempts} allowed")
    if question.checked_sha256 != question.candidates_sha256:
        reasons.append("the candidates are not those that were checked")
    return reasons
