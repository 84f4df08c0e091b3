"""What the engine proved over all rounds of a study, as the checks expect it of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpsynth.checks.accounting import ALWAYS, REQUIRED
from dpsynth.privacy.audit import BEFORE, DURING, Audit
from dpsynth.privacy.ledger import Charge
from dpsynth.privacy.lower_bounds import Calls
from federated.journal import Message, Study
from federated.messages import FIRST_TRAINING, decode_reply

_NO_MOMENTS = {"ok": True, "detail": "this site released no moments in this study", "statistic": 1.0, "threshold": 0.0}


@dataclass(frozen=True, kw_only=True)
class Proofs:
    """Findings and audits by name, plain values. What a round lacks is lacking here, so that the checks cannot pass without it."""

    selfcheck: Mapping[str, Any]
    canaries: Mapping[str, Any]
    uses_sgd: bool


def proofs_of(study: Study, charges: Sequence[tuple[int, Charge]], *, largest_bytes: int) -> Proofs:
    """Of each name the worst finding; the canaries of all rounds together.

    Rounds whose kept answer is a refusal, or that are open and have none, released nothing, so they prove nothing and lack nothing.
    """
    rounds = [(number, charge.settled, study.message(charge.run_id.split("/")[2])) for number, charge in charges]
    found = [(number, message.proof() or {}) for number, settled, message in rounds if _may_be_released(message, settled, largest_bytes)]
    findings: dict[str, Any] = {}
    for names, own in (
        (ALWAYS, [proof for number, proof in found if number < FIRST_TRAINING]),
        (REQUIRED, [proof for number, proof in found if number >= FIRST_TRAINING]),
    ):
        for name in names:
            given = [proof["findings"][name] for proof in own if name in proof.get("findings", {})]
            if given and len(given) == len(own):
                findings[name] = next((finding for finding in given if not finding["ok"]), given[-1])
    if not any(number < FIRST_TRAINING for number, _ in found):
        findings |= dict.fromkeys(ALWAYS, _NO_MOMENTS)
    trained = [proof.get("audits", {}) for number, proof in found if number >= FIRST_TRAINING]
    complete = bool(trained) and all({BEFORE, DURING} <= set(audits) for audits in trained)
    canaries = {}
    if complete:
        canaries = {name: together([Audit.from_json(audits[name]) for audits in trained]).to_json() for name in (BEFORE, DURING)}
    return Proofs(selfcheck=findings, canaries=canaries, uses_sgd=bool(trained))


def together(audits: Sequence[Audit]) -> Audit:
    """One audit of rounds of equal mechanisms, each with canaries and coins of its own.

    A canary takes part in one round, so what is private about it is what one round is: all of them are canaries of one mechanism, and
    the guesses of all rounds are guesses of one run (parallel composition; Steinke et al. 2023, theorem for any guesses of one run).
    """
    first = audits[0].mechanism
    if any(replace(audit.mechanism, declared_patients=first.declared_patients) != first for audit in audits):
        raise ValueError("Expected rounds of one mechanism.")
    calls = [audit.calls for audit in audits]
    return Audit(
        mechanism=first,
        cases=sum(audit.cases for audit in audits),
        guesses=sum(audit.guesses for audit in audits),
        correct=sum(audit.correct for audit in audits),
        calls=Calls(
            false_positives=sum(call.false_positives for call in calls),
            negatives=sum(call.negatives for call in calls),
            false_negatives=sum(call.false_negatives for call in calls),
            positives=sum(call.positives for call in calls),
        ),
    )


def _may_be_released(message: Message, settled: bool, largest_bytes: int) -> bool:
    """Whether an answer may have left: it is kept before it does, and its charge is closed after. Where it is gone, nobody can know."""
    reply = message.reply()
    if reply is None:
        return settled or message.digest() is None
    return decode_reply(reply, largest_bytes=max(largest_bytes, len(reply)))[0].outcome == "ok"
