"""What an unfinished check has computed, so that a killed one goes on instead of beginning again.

It is the same attempt as long as nothing has changed that a verdict depends on: then the same numbers would come out, and nobody learns
more from them than the attempt that was booked allows. For any other candidates, patients or version a new attempt is booked.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpsynth.artifacts import read_json, sha256_file, write_bytes, write_json
from dpsynth.errors import ArtifactError

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

    def attempt(self, subject: Mapping[str, str], *, booked: int) -> int | None:
        """Number of the attempt that was begun with this subject, if it is the last one that the ledger has booked."""
        record = self._record()
        return int(record["attempt"]) if record.get("subject") == dict(subject) and record.get("attempt") == booked else None

    def begin(self, subject: Mapping[str, str], *, attempt: int) -> None:
        """Forget what is there and start anew."""
        self.forget()
        write_json(self.folder / _RECORD, {"subject": dict(subject), "attempt": attempt, "parts": {}}, private=True)

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
