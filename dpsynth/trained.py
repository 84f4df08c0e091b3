"""What the verb train leaves behind for the others: the claim, and where it is booked. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpsynth.artifacts import RunFolder, read_json, write_json
from dpsynth.errors import ArtifactError
from dpsynth.privacy.guarantee import Guarantee
from dpsynth.privacy.ledger import Charge, Ledger

CLAIM, RESERVATION = "guarantee.json", "site/reservation.json"  # inside the stage's folder; `site` never leaves


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained generator's claim with its charge in the ledger."""

    guarantee: Guarantee
    ledger: Ledger
    charge: Charge


def load_trained(run: RunFolder, *, ledger_path: Path | None) -> Trained:
    """Read what train left; the ledger is the one it was booked in unless another path is named. Raises ArtifactError or LedgerError."""
    ledger, charge = booking(run, ledger_path=ledger_path)
    return Trained(guarantee=read_claim(run), ledger=ledger, charge=charge)


def read_claim(run: RunFolder) -> Guarantee:
    """The claim that train wrote. Raises ArtifactError."""
    return Guarantee.from_json(read_json(run.folder("train") / CLAIM))


def booking(run: RunFolder, *, ledger_path: Path | None) -> tuple[Ledger, Charge]:
    """The ledger and the charge of a run. Raises ArtifactError or LedgerError."""
    record = read_json(run.folder("train") / RESERVATION)
    try:
        reservation, known = str(record["reservation"]), Path(record["ledger"])
    except (KeyError, TypeError) as error:
        raise ArtifactError("The record of this run's reservation cannot be read. Restore the run folder or train again.") from error
    ledger = Ledger.load(ledger_path or known)
    return ledger, ledger.charge(reservation)


def write_booking(run: RunFolder, ledger: Ledger, reservation: str) -> None:
    """Note where a run is booked, for the site alone."""
    record = {"reservation": reservation, "ledger": str(ledger.path.resolve())}
    write_json(run.folder("train") / RESERVATION, record, private=True)
