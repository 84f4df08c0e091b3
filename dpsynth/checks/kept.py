"""What an unfinished check has computed, so that a killed one goes on instead of beginning again.

It is the same attempt as long as nothing has changed that a verdict depends on: then the same numbers would come out, and nobody learns
more from them than the attempt that was booked allows. For any other candidates, patients or version a new attempt is booked.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpsynth import __version__
from dpsynth.artifacts import held, read_json, sha256_file, write_bytes, write_json
from dpsynth.errors import ArtifactError
from dpsynth.privacy.ledger import Ledger
from dpsynth.progress import say_nothing

Arrays = dict[str, NDArray[Any]]
_RECORD = "unfinished.json"


class Keep(Protocol):
    """Asked for each part that takes long: gives what was kept under its name, or makes and keeps it."""

    def __call__(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """Arrays of the part, by name."""


def keep_nothing(name: str, make: Callable[[], Arrays]) -> Arrays:  # noqa: ARG001 (the protocol's)
    """Always computes."""
    return make()


@dataclass(frozen=True)
class UnfinishedCheck:
    """Parts on disk, each with its digest in the record, which is written after it. Only the site sees them: they are about patients."""

    folder: Path

    def alone(self) -> AbstractContextManager[None]:
        """Held from the booking to the end: parts of two checks at once would mix. Raises ArtifactError when another one is going on."""
        return held(self.folder.parent, busy="These images are being checked already. Wait for the end of that check.")

    def booked(self, ledger: Ledger, run_id: str, subject: Mapping[str, Any], *, note: Callable[[str], object] = say_nothing) -> int:
        """The attempt that a killed check of the same subject had booked, or a new one, booked before anything is looked at: its number.

        subject: plain values, all that a verdict depends on beside the run's patients and coins. `note` is told which attempt it is, and
        whether it goes on. Raises what `record_gate_attempt` raises.
        """
        own = {**subject, "run_id": run_id, "data_line": ledger.data_line, "dpsynth": __version__}
        known = self._record()
        goes_on = known.get("subject") == own and known.get("attempt") == ledger.gate_attempts(run_id)
        attempt = int(known["attempt"]) if goes_on else ledger.record_gate_attempt(run_id)
        if not goes_on:
            self.forget()
            write_json(self.folder / _RECORD, {"subject": own, "attempt": attempt, "parts": {}}, private=True)
        note(f"Attempt {attempt} of {ledger.genesis['max_gate_attempts']}" + (", goes on from an unfinished check." if goes_on else "."))
        return attempt

    def forget(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __call__(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """Arrays of the part; one whose file is damaged or of a record that is gone is made again."""
        record, path = self._record(), self.folder / f"{name}.npz"
        known = record.get("parts", {})
        if name in known and path.is_file() and sha256_file(path) == known[name]:
            with np.load(path, allow_pickle=False) as stored:
                return {key: stored[key] for key in stored.files}
        made, buffer = make(), io.BytesIO()
        np.savez(buffer, allow_pickle=False, **made)
        write_bytes(path, buffer.getvalue(), private=True)
        write_json(self.folder / _RECORD, {**record, "parts": {**known, name: sha256_file(path)}}, private=True)
        return made

    def _record(self) -> dict[str, Any]:
        try:
            found = read_json(self.folder / _RECORD)
        except ArtifactError:  # none, or one that was cut off
            return {}
        return found if isinstance(found, dict) else {}
