"""What the verb train leaves behind for the others: the claim, and where it is booked. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpsynth.artifacts import RunFolder, read_json, write_json
from dpsynth.config import DataConfig
from dpsynth.errors import ArtifactError
from dpsynth.privacy.guarantee import Guarantee
from dpsynth.privacy.ledger import Charge, Ledger

CLAIM, _RESERVATION = "guarantee.json", "site/reservation.json"  # inside the stage's folder; `site` never leaves
FEDERATION = "federation.json"  # of a run that several hospitals trained: their epsilons


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained generator's claim with its charge in the ledger."""

    guarantee: Guarantee
    ledger: Ledger
    charge: Charge


def default_ledger(data: DataConfig) -> Path:
    """Beside the data, so that all runs on the same data find the same ledger; phantoms have theirs in the working folder.

    Never read from a run folder: whoever made the run could then name a ledger of their own.
    """
    return Path(f"{data.name}.ledger.jsonl") if data.path is None else data.path.parent / f"{data.path.name}.ledger.jsonl"


def load_trained(run: RunFolder, data: DataConfig, *, ledger_path: Path | None) -> Trained:
    """Read what train left and find it in the data set's ledger. Raises ArtifactError or LedgerError."""
    if is_federated(run.path):
        raise ArtifactError(
            "This generator was trained by several hospitals, whose patients are not here to check it against. `dpsynth generate` "
            "draws from it; check, report and release do not take such a run: each site checks and approves, `dpsynth-federation` releases."
        )
    ledger = Ledger.load(ledger_path or default_ledger(data))
    return Trained(guarantee=read_claim(run), ledger=ledger, charge=booking(run, ledger))


def is_federated(run_path: Path) -> bool:
    """Whether several hospitals trained the run."""
    return (run_path / "train" / FEDERATION).is_file()


def read_claim(run: RunFolder) -> Guarantee:
    """The claim that train wrote. Raises ArtifactError."""
    return Guarantee.from_json(read_json(run.folder("train") / CLAIM))


def is_booked(run: RunFolder) -> bool:
    """Whether a reservation was made for the run."""
    return (run.path / "train" / _RESERVATION).is_file()


def booking(run: RunFolder, ledger: Ledger) -> Charge:
    """The charge of a run. Raises LedgerError when this ledger has none, ArtifactError when the record cannot be read."""
    try:
        reservation = str(read_json(run.folder("train") / _RESERVATION)["reservation"])
    except (KeyError, TypeError) as error:
        raise ArtifactError("The record of this run's reservation cannot be read. Restore the run folder or train again.") from error
    return ledger.charge(reservation)


def write_booking(run: RunFolder, reservation: str) -> None:
    """Note the reservation of a run, for the site alone."""
    write_json(run.folder("train") / _RESERVATION, {"reservation": reservation}, private=True)
