"""What the ledger vouches for beside the verdicts: files that a person looks at, or that leave with the candidates. Torch-free."""

from __future__ import annotations

from dpsynth.artifacts import RunFolder, sha256_file
from dpsynth.checks.verdict import CONTENT, REVIEW
from dpsynth.data.candidates import CELLS
from dpsynth.detector.model import FILE as DETECTOR

_NAMES = (f"check/{REVIEW}", f"check/{CONTENT}", f"generate/{DETECTOR}", f"generate/{CELLS}")


def looked_at(run: RunFolder) -> dict[str, str]:
    """SHA-256 by name in the run folder: noted in the verdicts, whose own digest is in the ledger."""
    return {name: sha256_file(run.path / name) for name in _NAMES if (run.path / name).is_file()}
