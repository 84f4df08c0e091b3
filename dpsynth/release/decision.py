"""From a run folder to the gate's question. The report shows the answer, the release acts on it; both ask here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpsynth.artifacts import RunFolder, read_json, sha256_file
from dpsynth.checks.noted import looked_at
from dpsynth.checks.verdict import VERDICTS, Verdict
from dpsynth.config import Config, parse_config
from dpsynth.data.candidates import Candidates, CellRow, load_candidates, load_cell_rows
from dpsynth.detector.model import FILE as DETECTOR
from dpsynth.detector.model import NO_DETECTOR, Detector
from dpsynth.errors import ArtifactError
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.unit import PrivacyUnit
from dpsynth.release.gate import Question
from dpsynth.trained import load_trained, require_local


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checked run, ready to be judged."""

    run: RunFolder
    run_id: str
    config: Config
    ledger: Ledger
    head: tuple[int, str]  # of the ledger, when it was asked
    candidates: Candidates
    cells: tuple[CellRow, ...]
    detector: Detector | None
    no_detector: str
    question: Question


def load_case(run_path: Path, *, ledger_path: Path | None, reviews: Mapping[str, str]) -> Case:
    """Read a run whose checks have finished. Raises ArtifactError or LedgerError when something is missing or was changed."""
    run = RunFolder.open(run_path)
    require_local(run)
    run.require("check")
    config = parse_config(run.config_text, base=run.path)
    trained = load_trained(run, config.data, ledger_path=ledger_path)
    guarantee, ledger, run_id = trained.guarantee, trained.ledger, trained.charge.run_id
    head = ledger.head()
    record = run.folder("check") / VERDICTS
    if sha256_file(record) != ledger.verdicts_sha256(run_id):
        raise ArtifactError("The verdicts are not those that the ledger noted when the checks ran. Run `dpsynth check` again.")
    result: dict[str, Any] = read_json(record)
    try:
        verdicts = tuple(Verdict.from_json(value) for value in result["verdicts"])
        checked = str(result["candidates_sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"The verdicts of this run cannot be read ({error}). Run `dpsynth check` again.") from error
    if result.get("files") != looked_at(run):
        raise ArtifactError("The review page, its list, the detector or the counts of cells are not those of the check. Run it again.")
    candidates = load_candidates(run)
    question = Question(
        # What the ledger says of the data set stands above the run folder; other runs may have been charged since.
        guarantee=replace(
            guarantee,
            data_name=ledger.genesis["data_name"],
            unit=PrivacyUnit(ledger.genesis["unit"]),
            ledger_epsilon=epsilon_pld(ledger.charged_mechanisms(), guarantee.delta),
        ),
        booked=trained.charge.mechanisms,
        budget_epsilon=ledger.budget_epsilon,
        spent_epsilon=ledger.spent(),
        configured_epsilon=config.privacy.epsilon,
        ledger_problems=tuple(ledger.verify()),
        verdicts=verdicts,
        required=config.gate.required,
        attempt=ledger.gate_attempts(run_id),
        max_attempts=int(ledger.genesis["max_gate_attempts"]),
        checked_sha256=checked,
        candidates_sha256=candidates.sha256,
        reviews=reviews,
        refusal=ledger.refusal(candidates.sha256),
    )
    return Case(
        run=run,
        run_id=run_id,
        config=config,
        ledger=ledger,
        head=head,
        candidates=candidates,
        cells=load_cell_rows(run),
        detector=detector_of(run),
        no_detector=no_detector_of(run, config),
        question=question,
    )


def detector_of(run: RunFolder) -> Detector | None:
    """The detector that was made with the candidates, if any."""
    path = run.folder("generate") / DETECTOR
    return Detector.from_json(read_json(path)) if path.is_file() else None


def no_detector_of(run: RunFolder, config: Config) -> str:
    """Why there is none though it was asked for; empty when there is one or nobody asked."""
    if not config.release.detector or (run.folder("generate") / DETECTOR).is_file():
        return ""
    return str(run.require("generate").facts.get(NO_DETECTOR, "none was made when the images were drawn"))
