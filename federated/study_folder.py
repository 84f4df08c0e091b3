"""The files of a study's folder at the coordinator, and the one of them that only grows, line by line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dpsynth.artifacts import storage_errors

# What the study began with, what its sites said, every answer, the question that is out, where it ended.
STUDY_FILE, KNOWN, EVENTS, QUESTION, OUTCOME = "study.json", "sites.json", "events.jsonl", "question.json", "outcome.json"


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Add one line. A process that died underway leaves half a line: the next one begins anew, readers skip it. Raises StorageError."""
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, (b"\n" if torn else b"") + json.dumps(value).encode() + b"\n")
        finally:
            os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines; none when there is no file yet."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
