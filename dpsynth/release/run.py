"""The verbs report and release: the same case, judged by the same gate."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from dpsynth.artifacts import require_new, require_writable, write_bytes, write_json
from dpsynth.checks.family import needed
from dpsynth.checks.verdict import Outcome
from dpsynth.errors import GateRefused, UsageError
from dpsynth.progress import Progress
from dpsynth.release.bundle import Release, write_release
from dpsynth.release.decision import Case, load_case
from dpsynth.release.gate import Allowed, Refused, decide
from dpsynth.report.epsilon import epsilon_report
from dpsynth.report.html import render
from dpsynth.report.policy import policy_rows
from dpsynth.signing import load_private


def report(run_path: Path, *, ledger_path: Path | None) -> Path:
    """Write report/report.html and report/epsilon_report.json of a checked run; returns the page. They stay at the site."""
    case = load_case(run_path, ledger_path=ledger_path, reviews={})
    answer = decide(case.question)
    view = _view(case, answer, site=True)
    case.run.reset("report")
    folder = case.run.folder("report")
    write_json(folder / "epsilon_report.json", view)
    write_bytes(folder / "report.html", _page(case, view).encode())
    case.run.complete("report", needs=("train", "generate", "check"))
    return folder / "report.html"


def release(run_path: Path, *, out: Path, key_path: Path, ledger_path: Path | None, reviews: Mapping[str, str], progress: Progress) -> Path:
    """Ask the gate and write the signed folder. Raises GateRefused with every reason."""
    private = load_private(key_path)
    case = load_case(run_path, ledger_path=ledger_path, reviews=reviews)
    flagged = {verdict.check for verdict in case.question.verdicts if verdict.outcome is Outcome.FLAG}
    if unknown := sorted(set(reviews) - flagged):
        raise UsageError(f"--accept {unknown[0]}: only a flag can be accepted; flagged: {', '.join(sorted(flagged)) or 'none'}.")
    answer = decide(case.question)
    if isinstance(answer, Refused):
        raise GateRefused(
            "The gate refuses the release: " + "; ".join(answer.reasons) + f". `dpsynth report {run_path}` shows the details."
        )
    require_new(out)
    require_writable(out)
    candidates = case.question.candidates_sha256
    case.ledger.record_decision(case.run_id, candidates_sha256=candidates, decision="released", words=reviews, after=case.head)
    head = case.ledger.head()
    release_id = hashlib.sha256(f"{case.question.candidates_sha256}:{head[1]}".encode()).hexdigest()[:16]
    package = Release(
        allowed=answer,
        release_id=release_id,
        candidates=case.candidates,
        candidates_sha256=case.question.candidates_sha256,
        classes=case.config.data.classes,
        guarantee=case.question.guarantee,
        verdicts=case.question.verdicts,
        required=needed(case.question.required),
        reviews=dict(reviews),
        method=case.config.method,
        report_html=_page(case, _view(case, answer, site=False)),
        ledger_head=head,
        settings=case.config.release,
        policy=policy_rows(case.config.gate),
        detector=case.detector,
        no_detector=case.no_detector,
    )
    return write_release(package, out=out, private=private, progress=progress)


def refuse(run_path: Path, *, ledger_path: Path | None, who: str, why: str) -> None:
    """Note in the ledger that a person looked at a checked run's images and refused them: for good, whatever the checks found."""
    case = load_case(run_path, ledger_path=ledger_path, reviews={})
    candidates = case.question.candidates_sha256
    case.ledger.record_decision(case.run_id, candidates_sha256=candidates, decision="refused", words={who: why}, after=case.head)


def _view(case: Case, answer: Allowed | Refused, *, site: bool) -> dict[str, object]:
    summary = case.ledger.summary()
    budget = {name: summary[name] for name in ("epsilon", "delta", "spent", "left", "max_gate_attempts")}
    reasons = list(answer.reasons) if isinstance(answer, Refused) else []
    lines, head = case.ledger.head()
    return epsilon_report(
        guarantee=case.question.guarantee,
        verdicts=case.question.verdicts,
        required=needed(case.question.required),
        decision={"allowed": isinstance(answer, Allowed), "reasons": reasons},
        budget={**budget, "gate_attempts": case.question.attempt},
        method=case.config.method,
        title=case.config.release.title,
        count=len(case.candidates.images),
        site=site,
        cells=[asdict(row) for row in case.cells],
        policy=policy_rows(case.config.gate),
        reviews=case.question.reviews,
        provenance={"candidates (SHA-256)": case.question.candidates_sha256, "ledger head": f"line {lines}, {head}"},
    )


def _page(case: Case, view: dict[str, object]) -> str:
    return render(view, images=case.candidates.images, labels=case.candidates.labels, classes=case.config.data.classes)
