"""From a run folder to the gate's question. The report shows the answer, the release acts on it; both ask here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpsynth.artifacts import RunFolder, read_json
from dpsynth.checks.verdict import Verdict
from dpsynth.config import Config, parse_config
from dpsynth.data.candidates import Candidates, candidates_digest, load_candidates
from dpsynth.errors import ArtifactError
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.ledger import Ledger
from dpsynth.release.gate import Question
from dpsynth.trained import load_trained


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checked run, ready to be judged."""

    run: RunFolder
    config: Config
    ledger: Ledger
    candidates: Candidates
    question: Question


def load_case(run_path: Path, *, ledger_path: Path | None, reviews: Mapping[str, str]) -> Case:
    """Read a run whose checks have finished. Raises ArtifactError or LedgerError when something is missing or was changed."""
    run = RunFolder.open(run_path)
    run.require("check")
    config = parse_config(run.config_text, base=run.path)
    trained = load_trained(run, ledger_path=ledger_path)
    guarantee, ledger = trained.guarantee, trained.ledger
    result: dict[str, Any] = read_json(run.folder("check") / "verdicts.json")
    try:
        verdicts = tuple(Verdict.from_json(value) for value in result["verdicts"])
        attempt, checked = int(result["attempt"]), str(result["candidates_sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"The verdicts of this run cannot be read ({error}). Run `dpsynth check` again.") from error
    question = Question(
        # Other runs may have been charged since this one was trained.
        guarantee=replace(guarantee, ledger_epsilon=epsilon_pld(ledger.charged_mechanisms(), guarantee.delta)),
        booked=trained.charge.mechanisms,
        budget_epsilon=ledger.budget_epsilon,
        configured_epsilon=config.privacy.epsilon,
        ledger_problems=tuple(ledger.verify()),
        verdicts=verdicts,
        required=config.gate.required,
        attempt=attempt,
        max_attempts=int(ledger.genesis["max_gate_attempts"]),
        checked_sha256=checked,
        candidates_sha256=candidates_digest(run),
        reviews=reviews,
    )
    return Case(run=run, config=config, ledger=ledger, candidates=load_candidates(run), question=question)
