"""The officer's word on checked candidates, signed with the site's key: approved or refused, and what the site's ledger holds.

An approval exists only when the site's gate allows it; a refusal can always be signed. Neither carries what the checks measured. Both
are noted in the site's ledger before they are written, with the words that stay there, and a refusal is for good: no approval of the
same images follows it. One that was handed over before cannot be called back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from dpsynth.artifacts import require_new, require_writable, write_json
from dpsynth.checks.verdict import Outcome
from dpsynth.errors import GateRefused, UsageError
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.ledger import Decision
from dpsynth.privacy.mechanism import to_json
from dpsynth.release.gate import Refused, decide
from dpsynth.release.statement import SiteStatement, plain, sign_site_statement, site_statement
from dpsynth.signing import key_id, load_private
from federated.site import Guard
from federated.site_checks import Joined, joined, question_of, required


def approve(guard: Guard, path: Path, *, key_path: Path | None, out: Path, reviews: Mapping[str, str]) -> SiteStatement:
    """Ask the site's gate and sign its yes; without a key, write it for the officer to sign. Raises GateRefused with every reason,
    UsageError for a review of what was not flagged.
    """
    head, work = guard.ledger.head(), joined(guard, path)
    question = question_of(guard, work, reviews=reviews)
    flagged = {verdict.check for verdict in question.verdicts if verdict.outcome is Outcome.FLAG}
    if unknown := sorted(set(reviews) - flagged):
        raise UsageError(f"--accept {unknown[0]}: only a flag can be accepted; flagged: {', '.join(sorted(flagged)) or 'none'}.")
    answer = decide(question)
    if isinstance(answer, Refused):
        raise GateRefused("Nothing was signed: " + "; ".join(answer.reasons) + ". `dpsynth-site refuse` signs a refusal.")
    public: dict[str, str] = {v.check: v.outcome.value for v in question.verdicts if v.check in guard.policy.public_checks}
    return _signed(guard, work, head=head, decision="approved", outcomes=public, words=reviews, key_path=key_path, out=out)


def refuse(guard: Guard, path: Path, *, key_path: Path | None, out: Path, who: str, why: str) -> SiteStatement:
    """Sign a refusal, whatever the checks found or whether they ran: for good, and with the reason in the ledger alone."""
    head, work = guard.ledger.head(), joined(guard, path)
    return _signed(guard, work, head=head, decision="refused", outcomes={}, words={who: why}, key_path=key_path, out=out)


def _signed(
    guard: Guard,
    work: Joined,
    *,
    head: tuple[int, str],
    decision: Literal["approved", "refused"],
    outcomes: Mapping[str, str],
    words: Mapping[str, str],
    key_path: Path | None,
    out: Path,
) -> SiteStatement:
    private = None if key_path is None else load_private(key_path)
    if private is not None and key_id(private.public_key()) in map(key_id, guard.coordinators):
        raise UsageError(f"{key_path} is the key of a coordinator, not of this site. Name the officer's own.")
    require_new(out, kind="file")
    require_writable(out)
    policy, ledger, header = guard.policy, guard.ledger, work.carried.header
    statement = site_statement(
        {
            "site": policy.site,
            "study": header.study,
            "decision": decision,
            "images_sha256": header.images_sha256,
            "plan_sha256": header.plan_sha256,
            "unit": policy.data.unit.value,
            "declared_patients": policy.data.declared_patients,
            "max_images_per_patient": policy.data.max_images_per_patient,
            "rounds": list(work.rounds),
            "mechanisms": [to_json(mechanism) for mechanism in work.mechanisms],
            "delta": header.delta,
            "epsilon": plain(epsilon_pld(work.mechanisms, header.delta)),
            "ledger_epsilon": plain(epsilon_pld(ledger.charged_mechanisms(), header.delta)),
            "budget_epsilon": plain(ledger.budget_epsilon),
            "budget_delta": ledger.delta,
            "attempt": ledger.gate_attempts(work.run_id),
            "max_attempts": int(ledger.genesis["max_gate_attempts"]),
            "required": list(required(guard, work)),
            "outcomes": dict(outcomes),
            "ledger_lines": head[0],  # before this decision, so that its words cannot be tried against the digest
            "ledger_sha256": head[1],
        }
    )
    noted: Decision = "released" if decision == "approved" else "refused"
    ledger.record_decision(work.run_id, candidates_sha256=header.images_sha256, decision=noted, words=words, after=head)
    guard.note_ledger()
    write_json(out, statement.model_dump(mode="json") if private is None else sign_site_statement(statement, private))
    return statement
