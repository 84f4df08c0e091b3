"""What a guard remembers on disk: with which plan and for whom a study began, the secrets of its open rounds, and every answer it gave.

The journal is for repeating answers and for going on after a crash. It is no record of what was spent: that is the ledger, and without a
journal the guard refuses more, never less. All files are for their owner only.

    STATE/ledger.json                         number and digest of the ledger's last line, as a command of the site or the guard saw it last
    STATE/studies/STUDY/study.json            plan's digest and coordinator's key id
    STATE/studies/STUDY/split.json            the coins: who is in the control set and in the audit pool, for all rounds of the study
    STATE/studies/STUDY/messages/ID/          request (digest), key (while the round is open), checkpoint.safetensors, proof.json, reply
    STATE/studies/STUDY/check/                what the checks found about the study's candidates
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsynth.artifacts import read_json, storage_errors, write_bytes, write_json
from dpsynth.config import DataConfig
from dpsynth.data.cohort import ImageSet
from dpsynth.data.split import Split, split_patients
from dpsynth.errors import ConfigError, DataError, LedgerError
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.noise import NoiseStream, fresh_key
from federated.messages import Code, Refused

LOST = (
    "Put back the ledger that knows most; a fresh or an older one would forget what the patients have lost. "
    "docs/site.md says what to do when the ledger is lost."
)
_PROOF, _LEDGER = "proof.json", "ledger.json"
_COINS = "split.json"
_LARGEST_NUMBER_OF_REFUSED_STUDIES = 1000  # the oldest are forgotten
_LARGEST_NUMBER_OF_ANSWERS = 5000  # of a study; further refusals are given and forgotten, so that nobody can fill the disk with them


def preparation(data: DataConfig) -> dict[str, Any]:
    """Plain values: how images and labels are read and prepared, beside what the ledger's digest of the data covers."""
    return data.model_dump(mode="json", exclude={"path", "name", "control_fraction", "exclusions", "phantom"})


@dataclass(frozen=True)
class Message:
    """The folder of one message id."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """Where training goes on after a crash."""
        return self.folder / "checkpoint.safetensors"

    def digest(self) -> str | None:
        """Digest of the request that had this id; None when there was none."""
        path = self.folder / "request"
        return path.read_text() if path.is_file() else None

    def reply(self) -> bytes | None:
        """The answer that was given; None while there is none."""
        path = self.folder / "reply"
        return path.read_bytes() if path.is_file() else None

    def key(self) -> bytes | None:
        """The secret key of the open round; None when it is gone."""
        path = self.folder / "key"
        return path.read_bytes() if path.is_file() else None

    def stream(self) -> NoiseStream:
        """The random numbers of the open round. Raises Refused(LOST) when its key is gone."""
        key = self.key()
        if key is None:
            raise Refused(Code.LOST)
        return NoiseStream(key=key)

    def proof(self) -> Any:
        """What the engine proved of the round, as `note_proof` wrote it; None when there is nothing."""
        path = self.folder / _PROOF
        return read_json(path) if path.is_file() else None

    def note_proof(self, found: Mapping[str, Any]) -> None:
        """Keep what the engine proved of the round, for the checks; batch sizes shine through it, so it stays at the site."""
        write_json(self.folder / _PROOF, found, private=True)

    def begin(self, digest: str) -> None:
        """Write a fresh secret key and the request's digest: before the charge, so that no charge is ever without its key."""
        write_bytes(self.folder / "request", digest.encode(), private=True)
        write_bytes(self.folder / "key", fresh_key(), private=True)

    def answer(self, digest: str, reply: bytes) -> None:
        """Keep an answer, and only then forget what could make another one."""
        write_bytes(self.folder / "request", digest.encode(), private=True)
        write_bytes(self.folder / "reply", reply, private=True)
        self.forget()

    def forget(self) -> None:
        """Destroy the key and the checkpoint."""
        (self.folder / "key").unlink(missing_ok=True)
        self.checkpoint.unlink(missing_ok=True)


@dataclass(frozen=True)
class Study:
    """The folder of one study."""

    folder: Path

    def message(self, message_id: str) -> Message:
        """The message of that id, known or not."""
        return Message(self.folder / "messages" / message_id)

    def split(self, images: ImageSet, data: DataConfig, *, cells: str, booked: bool) -> Split:
        """Who is trained on: by the key and the control fraction of before the first charge, whatever the policy says since.

        cells: digest of each image's cell. booked: whether a round was charged; until then all is drawn and noted anew. Raises ConfigError
        when `data` prepares images otherwise than then, and DataError when attributes differ: others would be trained on, or compared with
        what was trained on these.
        """
        path = self.folder / _COINS
        if not (booked and path.is_file()):
            first = {"key": fresh_key().hex(), "control_fraction": data.control_fraction, "settings": preparation(data), "cells": cells}
            write_json(path, first, private=True)
        known = read_json(path)
        if changed := [name for name, value in preparation(data).items() if known["settings"].get(name) != value]:
            raise ConfigError(f"data.{changed[0]} is not what it was when the study began. Put it back in the policy.")
        if known["cells"] != cells:
            raise DataError(
                f"The attributes of the patients ({', '.join(data.attributes)}) are not those with which {self.folder.name} began: "
                "the guard trains with the table that it read at its start. Put that table back."
            )
        return split_patients(images, control_fraction=float(known["control_fraction"]), key=bytes.fromhex(known["key"]))

    def is_full(self) -> bool:
        """Whether no further refusal is kept."""
        folder = self.folder / "messages"
        return folder.is_dir() and sum(1 for _ in folder.iterdir()) >= _LARGEST_NUMBER_OF_ANSWERS

    def forget_others(self, message: Message) -> None:
        """Destroy the secrets of open rounds that a later one has overtaken. Their charges stay."""
        folder = self.folder / "messages"
        for other in folder.iterdir() if folder.is_dir() else ():
            if other != message.folder:
                Message(other).forget()


@dataclass(frozen=True)
class Journal:
    """The folder of one guard."""

    folder: Path

    def alone(self) -> AbstractContextManager[None]:
        """Held by one answer at a time, in whatever process."""
        return self._locked("lock")

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def note_ledger(self, ledger: Ledger) -> None:
        """Remember the ledger's last line, so that an older copy, or another one, is known as such. Raises LedgerError when this is one."""
        with self._locked("ledger.lock"):
            noted = self.ledger()
            if noted is not None and not ledger.has_line(*noted):
                raise LedgerError(
                    f"{ledger.path} is not the ledger that this guard knows, or an older copy: it lacks line {noted[0]}. {LOST}"
                )
            head = ledger.head()
            if head != noted and self.folder.stat().st_uid == os.geteuid():  # a file of another user could not be read by the guard
                write_json(self.folder / _LEDGER, {"line": head[0], "sha256": head[1]}, private=True)

    def ledger(self) -> tuple[int, str] | None:
        """Number and digest of the line that was noted last; None when none was."""
        path = self.folder / _LEDGER
        if not path.is_file():
            return None
        noted = read_json(path)
        return int(noted["line"]), str(noted["sha256"])

    def studies(self) -> list[str]:
        """Names of the studies that began here."""
        folder = self.folder / "studies"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def _begun(self) -> int:
        """How many studies came as far as a charge. Others, which were refused, take none of the places that the policy has."""
        return len(self.studies()) - len(self._refused())

    def _refused(self) -> list[Path]:
        """Folders of studies that never came as far as a charge, of the oldest first."""
        folders = [self.folder / "studies" / name for name in self.studies()]
        return sorted((path for path in folders if not (path / _COINS).is_file()), key=lambda path: path.stat().st_mtime)

    def _make_room(self) -> None:
        """Forget the oldest refused studies, which cost nobody anything, so that they neither fill the disk nor keep others out."""
        for folder in self._refused()[: -_LARGEST_NUMBER_OF_REFUSED_STUDIES + 1 or None]:
            shutil.rmtree(folder)

    def known(self, name: str) -> tuple[Study, str, str] | None:
        """The study of that name with the plan's digest and the coordinator's key id; None when none began here."""
        folder = self.folder / "studies" / name
        if not (folder / "study.json").is_file():
            return None
        facts = read_json(folder / "study.json")
        return Study(folder), str(facts["plan_sha256"]), str(facts["coordinator"])

    def study(self, name: str, *, plan_sha256: str, key: str, booked: bool, limit: int) -> Study:
        """The study of that name, begun now when it is new. Its plan may change until a round was `booked`.

        Raises Refused when another coordinator began it, when it was booked with another plan, or when `limit` studies were charged.
        """
        folder = self.folder / "studies" / name
        path, own = folder / "study.json", {"plan_sha256": plan_sha256, "coordinator": key}
        if not booked and not (folder / _COINS).is_file() and self._begun() >= limit:
            raise Refused(Code.STUDIES)
        if not path.is_file():
            if booked:
                raise Refused(Code.LOST)
            self._make_room()
            write_json(path, own, private=True)
        known = read_json(path)
        if known["coordinator"] != key:
            raise Refused(Code.STUDY_TAKEN)
        if known["plan_sha256"] != plan_sha256:
            if booked:
                raise Refused(Code.PLAN_CHANGED)
            write_json(path, own, private=True)
        return Study(folder)

    def forget_answered(self) -> None:
        """Destroy the secrets of rounds whose answer is kept: a guard that was killed just then left them."""
        for reply in self.folder.glob("studies/*/messages/*/reply"):
            Message(reply.parent).forget()
