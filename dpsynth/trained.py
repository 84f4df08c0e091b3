"""What the verb train leaves behind for the others: the claim, and where it is booked. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsynth.artifacts import RunFolder, read_json, write_json
from dpsynth.config import DataConfig
from dpsynth.errors import ArtifactError, LedgerError
from dpsynth.privacy.guarantee import Guarantee
from dpsynth.privacy.ledger import Charge, Ledger

CLAIM, _RESERVATION = "guarantee.json", "site/reservation.json"  # inside the stage's folder; `site` never leaves
FEDERATION = "federation.json"  # of a run that several hospitals trained: their epsilons


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained generator's claim with its charge in the ledger. conditions: digest of what each image was trained as."""

    guarantee: Guarantee
    ledger: Ledger
    charge: Charge
    conditions: str


def default_ledger(data: DataConfig) -> Path:
    """Beside the data, so that all runs on the same data find the same ledger; phantoms have theirs in the working folder.

    Never read from a run folder: whoever made the run could then name a ledger of their own.
    """
    return Path(f"{data.name}.ledger.jsonl") if data.path is None else data.path.parent / f"{data.path.name}.ledger.jsonl"


def load_trained(run: RunFolder, data: DataConfig, *, ledger_path: Path | None) -> Trained:
    """Read what train left and find it in the data set's ledger. Raises ArtifactError, or LedgerError when the configuration, and so the
    policy of the gate, is not the one that was booked."""
    require_local(run)
    ledger = Ledger.load(ledger_path or default_ledger(data))
    charge = booking(run, ledger)
    conditions = str(_record(run).get("conditions"))
    if booked_digest(run, conditions) != charge.config_sha256:
        raise LedgerError(
            "The configuration of this run is not the one that the ledger noted before training. Restore config.yaml of the run folder; "
            "another policy needs another run."
        )
    if not charge.settled:
        raise LedgerError("The training of this run was never closed in the ledger. Run `dpsynth train` again; it goes on.")
    if run.digest("train") != charge.outcome_sha256:
        raise LedgerError(
            "The generator is not the one that the ledger noted when training ended, or what its training proved was changed. Restore the "
            "folder train, or train again."
        )
    return Trained(guarantee=read_claim(run), ledger=ledger, charge=charge, conditions=conditions)


def is_federated(run_path: Path) -> bool:
    """Whether several hospitals trained the run."""
    return (run_path / "train" / FEDERATION).is_file()


def require_local(run: RunFolder) -> None:
    """Raise ArtifactError, which says how one goes on, for a run that several hospitals trained."""
    if not is_federated(run.path):
        return
    step = (
        f"dpsynth-federation candidates {run.path} --folder FED --out FILE"
        if run.is_complete("generate")
        else f"dpsynth generate {run.path}"
    )
    raise ArtifactError(
        "This generator was trained by several hospitals, whose patients are not here to check it against, so `dpsynth` check, report, "
        f"release and refuse do not take such a run. Next: {step}; each site checks and approves; then dpsynth-federation release STUDY "
        f"{run.path} OUT --folder FED --approval FILE, which writes the report too."
    )


def read_claim(run: RunFolder) -> Guarantee:
    """The claim that train wrote. Raises ArtifactError."""
    return Guarantee.from_json(read_json(run.folder("train") / CLAIM))


def is_booked(run: RunFolder) -> bool:
    """Whether a reservation was made for the run."""
    return (run.path / "train" / _RESERVATION).is_file()


def booking(run: RunFolder, ledger: Ledger) -> Charge:
    """The charge of a run. Raises LedgerError when this ledger has none, ArtifactError when the record cannot be read."""
    return ledger.charge(str(_record(run)["reservation"]))


def _record(run: RunFolder) -> Mapping[str, Any]:
    record = read_json(run.folder("train") / _RESERVATION)
    if not isinstance(record, dict) or "reservation" not in record:
        raise ArtifactError("The record of this run's reservation cannot be read. Restore the run folder or train again.")
    return record


def booked_digest(run: RunFolder, conditions: str) -> str:
    """What the ledger notes of a run before it is trained: its configuration, and the digest of what each image is trained as."""
    return hashlib.sha256(json.dumps([run.config_text, conditions]).encode()).hexdigest()  # a list: no text can move from one to the other


def write_booking(run: RunFolder, reservation: str, *, conditions: str) -> None:
    """Note the reservation of a run, for the site alone. conditions: as in `booked_digest`; whoever changes them here finds none that fit
    another configuration."""
    write_json(run.folder("train") / _RESERVATION, {"reservation": reservation, "conditions": conditions}, private=True)
