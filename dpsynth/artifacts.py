"""A run folder: stages in order, every file with its digest, every write atomic."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsynth import __version__
from dpsynth.errors import ArtifactError, StorageError

SCHEMA_VERSION = 1
STAGES = ("train", "generate", "check", "report")
_RECORD = "stage.json"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a failed write into StorageError with the next step; the file name only, never the folder."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        step = "Free some space and run the command again." if full else "Check the folder's permissions and run the command again."
        raise StorageError(f"Could not write {path.name}: {error.strerror or error}. {step}") from error


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write atomically: another process sees the old file or the new one. `private` files are for their owner only (0600)."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o644)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def json_bytes(value: object) -> bytes:
    """The one form in which JSON files are written: sorted keys, two spaces, newline at the end, no NaN."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: object, *, private: bool = False) -> None:
    """Write JSON atomically."""
    write_bytes(path, json_bytes(value), private=private)


def read_json(path: Path) -> Any:
    """Read JSON. Raises ArtifactError when it is missing or not valid."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(f"Expected the file {path.name}, found none. Run the step that makes it.") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"Expected valid JSON in {path.name}: {error}.") from error


def require_new(path: Path, *, kind: str = "folder") -> None:
    """Raise ArtifactError when something is there already: nothing that was written is ever written over."""
    if path.exists():
        raise ArtifactError(f"Expected {path} not to exist. Name another {kind}.")


def require_writable(path: Path) -> None:
    """Raise StorageError when no file can be made where `path` is to be: asked before what cannot be taken back."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


@contextmanager
def held(folder: Path, *, busy: str) -> Iterator[None]:
    """A folder held by this process alone, made when missing; who dies lets go. Raises ArtifactError, which says `busy`, when another
    process holds it.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArtifactError(busy) from error
        yield
    finally:
        os.close(descriptor)


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What a finished stage wrote: files with SHA-256, digests of the stages it was made from, public facts."""

    files: Mapping[str, str]
    needs: Mapping[str, str]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """One run on disk. Make it with `create` or `open`."""

    path: Path
    config_text: str

    @classmethod
    def create(cls, path: Path, *, config_text: str) -> RunFolder:
        """Start a run in a new or empty folder. Raises ArtifactError when files are there."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ArtifactError(f"Expected {path} not to exist or to be empty. Name another run folder.")
        half_made = path.with_name(f".{path.name}.new")  # a killed run leaves this, never a run folder without its run.json
        shutil.rmtree(half_made, ignore_errors=True)
        write_bytes(half_made / "config.yaml", config_text.encode())
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        digest = hashlib.sha256(config_text.encode()).hexdigest()
        facts = {"schema_version": SCHEMA_VERSION, "dpsynth": __version__, "config_sha256": digest, "created": created}
        write_json(half_made / "run.json", facts)
        with storage_errors(path):
            half_made.replace(path)
            sync_folder(path.parent)
        return cls(path, config_text)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open a run. Raises ArtifactError for another schema version, a changed configuration or a folder that is no run."""
        if not (path / "run.json").is_file():
            raise ArtifactError(f"Expected a run folder at {path}, found no run.json. `dpsynth train` makes one.")
        facts = read_json(path / "run.json")
        version = facts.get("schema_version") if isinstance(facts, dict) else None
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"Expected a run folder of schema version {SCHEMA_VERSION}, found {version!r}. "
                "Use the dpsynth version that made it, or train again."
            )
        try:
            text = (path / "config.yaml").read_bytes()
        except OSError as error:
            raise ArtifactError("Expected the run's config.yaml, found none. Restore it or train again.") from error
        if hashlib.sha256(text).hexdigest() != facts.get("config_sha256"):
            raise ArtifactError("The run's config.yaml was changed after the run began. Restore it or train again.")
        return cls(path, text.decode())

    def folder(self, stage: str) -> Path:
        """The folder of a stage, made when missing."""
        path = self.path / stage
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def alone(self, stage: str) -> Iterator[Path]:
        """The folder of a stage, held by this process alone. Raises ArtifactError when another one works in it."""
        with held(self.folder(stage), busy="Another process is working in this run folder. Wait for its end, or name another folder."):
            yield self.path / stage

    def is_complete(self, stage: str) -> bool:
        """Whether the stage has been finished."""
        return (self.path / stage / _RECORD).is_file()

    def complete(self, stage: str, *, needs: tuple[str, ...] = (), facts: Mapping[str, Any] | None = None) -> None:
        """Finish a stage: its record is written last, so a stage without one is unfinished."""
        folder = self.folder(stage)
        for leftover in folder.rglob(".*.tmp"):  # of a write that was killed
            leftover.unlink()
        files = {str(path.relative_to(folder)): sha256_file(path) for path in _files(folder)}
        inputs = {name: self.digest(name) for name in needs}
        write_json(folder / _RECORD, {"files": files, "needs": inputs, "facts": dict(facts or {})})

    def require(self, stage: str) -> StageRecord:
        """The record of a finished stage whose files are unchanged. Raises ArtifactError that names the file or the verb to run."""
        if not self.is_complete(stage):
            raise ArtifactError(f"The step {stage!r} has not finished for this run. Run `dpsynth {stage}` first.")
        folder = self.path / stage
        raw = read_json(folder / _RECORD)
        record = StageRecord(files=raw["files"], needs=raw["needs"], facts=raw["facts"])
        present = {str(path.relative_to(folder)): path for path in _files(folder)}
        for name, digest in record.files.items():
            if name not in present:
                raise ArtifactError(f"{stage}/{name} is missing. Run `dpsynth {stage}` again.")
            if sha256_file(present[name]) != digest:
                raise ArtifactError(f"{stage}/{name} was changed after it was written. Run `dpsynth {stage}` again.")
        for name in sorted(present.keys() - record.files.keys()):
            raise ArtifactError(f"{stage}/{name} was added after the step finished. Remove it.")
        for name, digest in record.needs.items():
            self.require(name)
            if self.digest(name) != digest:
                raise ArtifactError(f"{name!r} was run again after {stage!r}. Run `dpsynth {stage}` again.")
        return record

    def digest(self, stage: str) -> str:
        """SHA-256 of the record of a finished stage, which holds those of its files."""
        return sha256_file(self.path / stage / _RECORD)

    def reset(self, stage: str) -> None:
        """Remove a stage and everything made from it, to do it again."""
        for name in STAGES[STAGES.index(stage) :]:
            shutil.rmtree(self.path / name, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _RECORD)
