"""The ledger of one data set: what was charged, in an append-only, hash-chained, locked and synced file.

Line 1 holds the data owner's budget. Every further line holds the SHA-256 of the line before it. A chain cannot see that its end was cut
off, so a head file beside the ledger holds the number of lines, the last hash, and before each write the hash of the line to come;
every release carries the same head, and `problems_of` compares. A reservation is charged in full from the moment its line is synced;
only a settlement, for fewer steps of the same mechanisms, lowers the charge. Epsilon is never stored: it is recomputed.

A torn last line (the machine died while writing) was never returned to anyone, so nothing was trained on it. It is closed by a
`recovered` line that names its length and digest; no byte is ever removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dpsynth.artifacts import storage_errors, sync_folder, write_bytes
from dpsynth.errors import BudgetExceeded, LedgerError, LedgerTampered
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.mechanism import Mechanism, PoissonDpSgd, from_json, to_json
from dpsynth.privacy.unit import PrivacyUnit

SCHEMA = 1
Decision = Literal["released", "refused"]
_NOTHING = "0" * 64  # the hash before the first line
_TYPES = ("genesis", "data", "reserve", "resume", "settle", "gate", "verdicts", "decision", "recovered")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the file: its bytes without the newline, and its content, None when it does not parse (torn)."""

    number: int
    raw: bytes
    entry: dict[str, Any] | None

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes."""
        return hashlib.sha256(self.raw).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What one reservation costs now: what was reserved until it is settled, then what was executed."""

    reservation: str
    line: int
    time: float
    purpose: str
    run_id: str
    config_sha256: str
    mechanisms: tuple[Mechanism, ...]
    settled: bool
    outcome_sha256: str = ""  # of what came of it, noted when it was settled
    coins_sha256: str = ""  # of key and control fraction, which say who is trained on, noted before training


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """A ledger on disk. All methods read it anew, so two objects, or two processes, see the same truth."""

    path: Path

    @classmethod
    def open_new(
        cls,
        path: Path,
        *,
        data_name: str,
        unit: PrivacyUnit,
        epsilon: float,
        delta: float,
        max_gate_attempts: int,
        data_digest: str,
        digest_salt: str,
    ) -> Ledger:
        """Start the ledger of a data set. Raises LedgerError when one is there: a budget is never rewritten."""
        if not epsilon > 0 or math.isnan(epsilon):
            raise LedgerError(f"Expected a budget epsilon above 0, found {epsilon!r}.")
        if not 0 < delta < 1:
            raise LedgerError(f"Expected delta between 0 and 1, found {delta!r}.")
        if max_gate_attempts < 1:
            raise LedgerError(f"Expected at least one gate attempt, found {max_gate_attempts}: nothing could ever be released.")
        if path.is_dir():
            raise LedgerError(f"Expected {path} to be the name of a file, found a folder.")
        ledger = cls(path=path.resolve())
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with ledger._locked():
            if path.exists():
                raise LedgerError(f"A ledger exists already at {path}. Its budget cannot be changed; `dpsynth ledger show` prints it.")
            if ledger._known_lines() > 0:
                raise LedgerError(
                    f"The ledger {path.name} is gone, but its head file {ledger._head_path().name} is there. "
                    "Put the newest copy of the ledger back and leave the head file, which refuses one that is too old; "
                    "a new budget for the same data would forget what was spent. docs/site.md says what to do without a copy."
                )
            genesis = {
                "schema": SCHEMA,
                "data_name": data_name,
                "unit": unit.value,
                "epsilon": "inf" if epsilon == math.inf else epsilon,
                "delta": delta,
                "max_gate_attempts": max_gate_attempts,
                "data_digest": data_digest,
                "digest_salt": digest_salt,
            }
            ledger._append("genesis", genesis, lines=())
        return ledger

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """Open an existing ledger. Raises LedgerError when there is none, LedgerTampered when it does not hold."""
        if not path.is_file():
            raise LedgerError(
                f"No ledger at {path}. Name it with --ledger; if it is gone, put its newest copy back and leave its head file; "
                "for data that never had one the data owner opens one with `dpsynth ledger open CONFIG --epsilon E`."
            )
        ledger = cls(path=path.resolve())  # so that every name of the file leads to one lock
        ledger._sound()
        return ledger

    @classmethod
    def problems_of(cls, path: Path, *, anchor: tuple[int, str] | None = None) -> list[str]:
        """Everything that does not hold, each with its line; empty when the ledger is sound.

        `anchor` is the head that a release carries: an older copy of the ledger, or another one, does not have that line.
        """
        if not path.is_file():
            raise LedgerError(f"No ledger at {path}.")
        ledger = cls(path=path.resolve())
        problems = ledger.verify()
        if anchor is not None and not problems and not ledger.has_line(*anchor):
            problems.append(f"line {anchor[0]}: it is not the one that the release was made with; this is an older or another ledger")
        return problems

    # -- what it says ------------------------------------------------------------------------------------------------

    @property
    def genesis(self) -> dict[str, Any]:
        """The first line."""
        entry = self._sound()[0].entry
        if entry is None:
            raise LedgerTampered("line 1: it does not parse")
        return entry

    @property
    def delta(self) -> float:
        """Delta at which the budget is counted."""
        return float(self.genesis["delta"])

    @property
    def budget_epsilon(self) -> float:
        """The data owner's budget."""
        return float(self.genesis["epsilon"])

    def charges(self) -> tuple[Charge, ...]:
        """Every reservation with what it costs now."""
        return _charges(self._sound())

    def charge(self, reservation: str) -> Charge:
        """The charge of one reservation. Raises LedgerError when there is none."""
        found = next((charge for charge in self.charges() if charge.reservation == reservation), None)
        if found is None:
            raise LedgerError(f"The ledger {self.path.name} has no reservation {reservation}. Name the ledger that this run was booked in.")
        return found

    def charged_mechanisms(self) -> tuple[Mechanism, ...]:
        """All mechanisms that were charged, over all runs."""
        return tuple(mechanism for charge in self.charges() for mechanism in charge.mechanisms)

    def spent(self) -> float:
        """Epsilon of everything charged, at the ledger's delta."""
        return epsilon_pld(self.charged_mechanisms(), self.delta)

    def gate_attempts(self, run_id: str) -> int:
        """Gate attempts booked for one trained generator."""
        return sum(1 for line in self._sound() if line.entry and _is(line.entry, "gate", run_id))

    def head(self) -> tuple[int, str]:
        """Number of lines and SHA-256 of the last one: the anchor that a release carries."""
        lines = self._sound()
        return len(lines), lines[-1].digest

    def has_line(self, number: int, digest: str) -> bool:
        """Whether it holds that line, as it was when `head` gave it."""
        lines = self._sound()
        return 1 <= number <= len(lines) and lines[number - 1].digest == digest

    def summary(self) -> dict[str, Any]:
        """Plain values for `dpsynth ledger show`."""
        genesis, delta, spent = self.genesis, self.delta, self.spent()
        rows = [
            {
                "line": charge.line,
                "time": _stamp(charge.time),
                "state": "settled" if charge.settled else "reserved",
                "purpose": charge.purpose,
                "epsilon": _plain(epsilon_pld(charge.mechanisms, delta)),
                "mechanisms": [to_json(mechanism) for mechanism in charge.mechanisms],
            }
            for charge in self.charges()
        ]
        gates = sum(1 for line in self._sound() if line.entry and line.entry["type"] == "gate")
        decisions = [
            {
                "line": entry["seq"],
                "time": _stamp(entry["time"]),
                **{name: entry[name] for name in ("run_id", "candidates_sha256", "decision", "words")},
            }
            for entry in self.decisions()
        ]
        changes = [
            {"line": line.number, "time": _stamp(line.entry["time"]), "words": line.entry["words"]}
            for line in self._sound()
            if line.entry and line.entry["type"] == "data"
        ]
        keep = {name: genesis[name] for name in ("data_name", "unit", "epsilon", "delta", "max_gate_attempts")}
        left = max(self.budget_epsilon - spent, 0.0) if math.isfinite(spent) else 0.0
        found = {"charges": rows, "spent": _plain(spent), "left": _plain(left), "gate_attempts": gates, "decisions": decisions}
        return {**keep, **found, "data_changes": changes}

    @property
    def data_line(self) -> int:
        """Number of the line that says which data the ledger is for: the first, or that of the last change."""
        return _data_line(self._sound()).number

    @property
    def digest_salt(self) -> bytes:
        """Salt of all digests of the data that stay beside the ledger."""
        return bytes.fromhex(self.genesis["digest_salt"])

    def require_data(self, digest: str) -> None:
        """Raise LedgerError unless the ledger is for data with this digest."""
        line = _data_line(self._sound())
        if not secrets.compare_digest(_data_digest(line), digest):
            raise LedgerError(
                f"This ledger is for other data: images, labels or patient ids differ from those of its line {line.number}. Put the data "
                "back as they were. If they had to change, as when a patient withdraws, `dpsynth ledger data-changed` (at a site of a "
                "federation `dpsynth-site data-changed`) notes it; a new ledger would forget what these patients spent."
            )

    def require_unchanged(self, run_id: str) -> None:
        """Raise LedgerError when the data changed since the run was booked, or when it was not booked."""
        lines = self._sound()
        _require_same_data(lines, _charge_of(lines, run_id))

    # -- what changes it ---------------------------------------------------------------------------------------------

    def change_data(self, digest: str, *, who: str, why: str) -> None:
        """Note that the data are others from now on: all charges stay, and nobody goes on with what was booked before.

        Each patient, of the old data or the new, loses at most what all charges compose to. Raises LedgerError when nothing changed.
        """
        with self._locked():
            lines = self._recovered()
            if _data_digest(_data_line(lines)) == digest:
                raise LedgerError("The data are those that the ledger is for. There is nothing to note.")
            self._append("data", {"data_digest": digest, "words": {who: why}, "salt": secrets.token_hex(16)}, lines=lines)

    def reserve(
        self,
        mechanisms: Sequence[Mechanism],
        *,
        purpose: str,
        run_id: str,
        config_sha256: str = "",
        coins_sha256: str = "",
        data_line: int = 1,
    ) -> str:
        """Charge `mechanisms` in full before the data is touched; returns the reservation. Raises BudgetExceeded.

        data_line: what `data_line` was before the images were read. Raises LedgerError when they have changed since.

        The configuration's digest is booked too: one reservation pays for one training, not for two that differ and share their noise.
        So is that of the patients' coins (key and control fraction): who is trained on cannot be chosen after looking at the result.
        """
        with self._locked():
            lines = self._recovered()
            if _data_line(lines).number != data_line:
                raise LedgerError("The data changed after they were read, so nothing was booked. Start the command, or the guard, again.")
            self._require_affordable(lines, mechanisms)
            reservation = secrets.token_hex(8)
            fields = {
                "reservation": reservation,
                "purpose": purpose,
                "run_id": run_id,
                "config_sha256": config_sha256,
                "coins_sha256": coins_sha256,
                "mechanisms": [to_json(mechanism) for mechanism in mechanisms],
            }
            self._append("reserve", fields, lines=lines)
            return reservation

    def require_affordable(self, mechanisms: Sequence[Mechanism]) -> None:
        """Raise BudgetExceeded when `reserve` would: asked before long work. Books nothing, so `reserve` asks again."""
        self._require_affordable(self._sound(), mechanisms)

    def _require_affordable(self, lines: tuple[Line, ...], mechanisms: Sequence[Mechanism]) -> None:
        charged = [mechanism for charge in _charges(lines) for mechanism in charge.mechanisms]
        would = epsilon_pld([*charged, *mechanisms], self.delta)
        if not would <= self.budget_epsilon:
            spent = epsilon_pld(charged, self.delta)
            raise BudgetExceeded(
                f"The budget of this data set is epsilon {self.budget_epsilon:g} at delta {self.delta:.3g}; {spent:.3f} is spent and "
                f"this run would bring it to {would:.3f}. "
                "Lower privacy.epsilon, or ask the data owner; `dpsynth ledger show` lists the charges."
            )

    def resume(self, reservation: str, mechanisms: Sequence[Mechanism], *, config_sha256: str = "", coins_sha256: str = "") -> None:
        """Note that a killed run goes on inside its reservation. Raises LedgerError when it is settled or differs."""
        with self._locked():
            lines = self._recovered()
            charge = _open_charge(lines, reservation)
            _require_same_data(lines, charge)
            same = (tuple(mechanisms), config_sha256, coins_sha256) == (charge.mechanisms, charge.config_sha256, charge.coins_sha256)
            if not same:
                raise LedgerError("The run's mechanisms or settings differ from those that were reserved. Start a new run.")
            self._append("resume", {"reservation": reservation}, lines=lines)

    def settle(self, reservation: str, *, mechanisms: Sequence[Mechanism], outcome_sha256: str = "") -> None:
        """Replace a reservation by what was executed: the same mechanisms, at most with fewer DP-SGD steps.

        Sound only when the stop did not depend on the data (a crash, an operator's decision).
        """
        with self._locked():
            lines = self._recovered()
            charge = _open_charge(lines, reservation)
            if not _at_most(mechanisms, charge.mechanisms):
                raise LedgerError("A settlement may only lower the steps of the reserved mechanisms.")
            fields = {"reservation": reservation, "mechanisms": [to_json(mechanism) for mechanism in mechanisms]}
            self._append("settle", {**fields, "outcome_sha256": outcome_sha256}, lines=lines)

    def record_verdicts(self, run_id: str, sha256: str) -> None:
        """Note the digest of what the checks found, so that verdicts edited later are known as such."""
        with self._locked():
            self._append("verdicts", {"run_id": run_id, "sha256": sha256}, lines=self._recovered())

    def verdicts_sha256(self, run_id: str) -> str | None:
        """Digest of what the last finished checks of a run found; None when there were none."""
        found = [line.entry["sha256"] for line in self._sound() if line.entry and _is(line.entry, "verdicts", run_id)]
        return found[-1] if found else None

    def record_decision(
        self, run_id: str, *, candidates_sha256: str, decision: Decision, words: Mapping[str, str], after: tuple[int, str]
    ) -> None:
        """Note what a person decided on these images: for a release the words on each accepted flag, for a refusal who and why.

        after: the `head` of when the question was asked. Raises LedgerError when anything was noted since, which might change the answer.
        Digests of later lines leave with releases and statements; the salt keeps anybody from trying words against them.
        """
        fields = {"run_id": run_id, "candidates_sha256": candidates_sha256, "decision": decision, "words": dict(words)}
        fields["salt"] = secrets.token_hex(16)
        with self._locked():
            lines = self._recovered()
            if (len(lines), lines[-1].digest) != after:
                raise LedgerError("Something else was noted in the ledger meanwhile, so nothing was decided. Run the command again.")
            self._append("decision", fields, lines=lines)

    def decisions(self) -> tuple[dict[str, Any], ...]:
        """All of them, as they were noted."""
        return tuple(line.entry for line in self._sound() if line.entry and line.entry["type"] == "decision")

    def decided(self, candidates_sha256: str, decision: Decision) -> tuple[dict[str, Any], ...]:
        """Those by which these images were released, or refused."""
        return tuple(said for said in self.decisions() if (said["candidates_sha256"], said["decision"]) == (candidates_sha256, decision))

    def refusal(self, candidates_sha256: str) -> str:
        """Who refused these images and why; empty when nobody did. A refusal is for good."""
        said = self.decided(candidates_sha256, "refused")
        return "; ".join(f"{who}: {why}" for entry in said for who, why in entry["words"].items())

    def record_gate_attempt(self, run_id: str) -> int:
        """Book one more look of the gate at a generator's images; returns its number.

        Raises BudgetExceeded past the cap, LedgerError when the data changed since the run was booked.
        """
        with self._locked():
            lines = self._recovered()
            _require_same_data(lines, _charge_of(lines, run_id))
            done = sum(1 for line in lines if line.entry and _is(line.entry, "gate", run_id))
            cap = int(self.genesis["max_gate_attempts"])
            if done >= cap:
                raise BudgetExceeded(
                    f"This generator was checked {done} times and the data owner allows {cap}. "
                    "Another one, of a new run or study, costs epsilon anew."
                )
            self._append("gate", {"run_id": run_id}, lines=lines)
            return done + 1

    # -- soundness ---------------------------------------------------------------------------------------------------

    def verify(self) -> list[str]:
        """Everything that does not hold, each with its line."""
        head, lines, _ = self._snapshot()
        return self._structure_problems(head, lines) or _budget_problems(lines)

    def _structure_problems(self, head: bytes | None, lines: tuple[Line, ...]) -> list[str]:
        return _chain_problems(lines) + self._head_problems(head, lines) or _meaning_problems(lines)

    def _sound(self) -> tuple[Line, ...]:
        head, lines, _ = self._snapshot()
        problems = self._structure_problems(head, lines)
        if problems:
            raise LedgerTampered(
                f"The ledger {self.path.name} does not hold: {'; '.join(problems)}. Keep both files; "
                "an older copy put back would forget charges. docs/site.md says what to do."
            )
        return lines

    def _snapshot(self) -> tuple[bytes | None, tuple[Line, ...], bytes]:
        """Head file, complete lines, and the torn bytes after the last newline, of one moment: readers hold no lock."""
        while True:
            head = self._head_bytes()
            *complete, torn = self.path.read_bytes().split(b"\n")
            if self._head_bytes() == head:
                return head, tuple(Line(number=i, raw=raw, entry=_parse(raw)) for i, raw in enumerate(complete, 1)), torn

    def _head_bytes(self) -> bytes | None:
        try:
            return self._head_path().read_bytes()
        except FileNotFoundError:
            return None

    def _head_path(self) -> Path:
        return self.path.with_name(self.path.name + ".head")

    def _head_problems(self, raw: bytes | None, lines: tuple[Line, ...]) -> list[str]:
        name = self._head_path().name
        if raw is None:
            return [f"the head file {name} is missing, so nobody can tell whether lines after line {len(lines)} are missing too"]
        try:
            head = json.loads(raw)
            count, digest, coming = int(head["lines"]), str(head["sha256"]), head.get("next")
        except (ValueError, TypeError, KeyError, AttributeError):
            return [f"the head file {name} cannot be read, so nobody can tell whether lines after line {len(lines)} are missing"]
        if count < 0 or count > len(lines):
            return [f"line {len(lines) + 1}: the end of the ledger was cut off; the head file knows {count} lines"]
        if digest != (lines[count - 1].digest if count else _NOTHING):
            return [f"line {count}: it is not the line that the head file names"]
        added = lines[count:]
        announced = not added or (added[-1].digest == coming and (len(added) == 1 or (len(added) == 2 and added[0].entry is None)))
        return [] if announced else [f"line {count + 1}: it was added behind the head file's back"]

    def _recovered(self) -> tuple[Line, ...]:
        """Under the lock: close a torn last line and bring the head up to date."""
        lines = self._sound()
        torn = self._snapshot()[2]
        if torn:
            facts = {"torn_bytes": len(torn), "torn_sha256": hashlib.sha256(torn).hexdigest()}
            self._append("recovered", facts, lines=lines, torn=torn)
        elif self._known_lines() != len(lines):
            self._write_head(lines)
        return self._snapshot()[1]

    def _known_lines(self) -> int:
        raw = self._head_bytes()
        return 0 if raw is None else int(json.loads(raw)["lines"])

    def _append(self, kind: str, fields: dict[str, Any], *, lines: tuple[Line, ...], torn: bytes = b"") -> None:
        """Announce the line in the head, write it behind `lines` (and the torn bytes after them), bring the head up to date."""
        before = (*lines, Line(number=len(lines) + 1, raw=torn, entry=None)) if torn else lines
        last = max((float(line.entry["time"]) for line in lines if line.entry), default=0.0)
        now = time.time()
        entry = {
            "seq": len(before) + 1,
            "type": kind,
            "previous": before[-1].digest if before else _NOTHING,
            "time": max(now, last),
            **({"clock_went_back": True} if now < last else {}),
            **fields,
        }
        raw = json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        line = Line(number=len(before) + 1, raw=raw, entry=entry)
        self._write_head(lines, coming=line.digest)
        with storage_errors(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                _write_all(descriptor, (b"\n" if torn else b"") + raw + b"\n")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            sync_folder(self.path.parent)
        self._write_head((*before, line))

    def _write_head(self, lines: tuple[Line, ...], *, coming: str | None = None) -> None:
        head = {"lines": len(lines), "sha256": lines[-1].digest if lines else _NOTHING}
        write_bytes(self._head_path(), json.dumps({**head, **({"next": coming} if coming else {})}).encode() + b"\n", private=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self.path.with_name(self.path.name + ".lock")
        with storage_errors(lock):
            descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    """Write everything, or take back what was written: nobody was told of a line that failed."""
    size = os.fstat(descriptor).st_size
    try:
        while content:
            content = content[os.write(descriptor, content) :]
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _data_line(lines: tuple[Line, ...]) -> Line:
    return [line for line in lines if line.entry is not None and line.entry["type"] in ("genesis", "data")][-1]


def _data_digest(line: Line) -> str:
    return str((line.entry or {})["data_digest"])


def _charge_of(lines: tuple[Line, ...], run_id: str) -> Charge:
    """The first charge of a run."""
    booked = [charge for charge in _charges(lines) if charge.run_id == run_id]
    if not booked:
        raise LedgerError("This run is not booked in this ledger. Name the ledger that it was trained under.")
    return booked[0]


def _require_same_data(lines: tuple[Line, ...], charge: Charge) -> None:
    line = _data_line(lines).number
    if charge.line < line:
        raise LedgerError(
            f"This was booked in line {charge.line}, before the data changed in line {line}, so it ends there: its images cannot be "
            "checked against other patients than those that it was trained on."
        )


def _is(entry: dict[str, Any], kind: str, run_id: str) -> bool:
    return bool(entry["type"] == kind and entry["run_id"] == run_id)


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(raw)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _chain_problems(lines: tuple[Line, ...]) -> list[str]:
    if not lines:
        return ["line 1: the budget is missing"]
    problems, previous = [], _NOTHING
    for index, line in enumerate(lines):
        following = lines[index + 1].entry if index + 1 < len(lines) else None
        if line.entry is None:
            if not (following and following.get("type") == "recovered" and following.get("torn_sha256") == line.digest):
                problems.append(f"line {line.number}: it does not parse")
        elif line.entry.get("previous") != previous:
            problems.append(f"line {line.number}: it does not follow line {line.number - 1}, one of them was changed")
        elif line.entry.get("seq") != line.number:
            problems.append(f"line {line.number}: it carries number {line.entry.get('seq')!r}")
        previous = line.digest
    return problems


def _meaning_problems(lines: tuple[Line, ...]) -> list[str]:
    """What a sound chain may still get wrong: unknown types, settlements that raise or invent."""
    entries = [(line.number, line.entry) for line in lines if line.entry is not None]
    genesis = entries[0][1]
    if genesis.get("type") != "genesis" or genesis.get("schema") != SCHEMA:
        return [f"line 1: expected a budget of schema {SCHEMA}"]
    problems = []
    for number, entry in entries:
        if entry.get("type") not in _TYPES or (entry.get("type") == "genesis") != (number == 1):
            problems.append(f"line {number}: unexpected type {entry.get('type')!r}")
    try:
        if not problems:
            _charges(lines)
    except (LedgerError, KeyError, TypeError, ValueError) as error:
        problems.append(f"a charge cannot be read: {error}")
    return problems


def _budget_problems(lines: tuple[Line, ...]) -> list[str]:
    genesis = lines[0].entry or {}
    mechanisms = [mechanism for charge in _charges(lines) for mechanism in charge.mechanisms]
    spent = epsilon_pld(mechanisms, float(genesis["delta"]))
    if spent <= float(genesis["epsilon"]) * (1 + 1e-9):
        return []
    return [f"the charges sum up to epsilon {spent:.4g}, above the budget {genesis['epsilon']}"]


def _charges(lines: tuple[Line, ...]) -> tuple[Charge, ...]:
    charges: dict[str, Charge] = {}
    for line in lines:
        entry = line.entry
        if entry is None or entry["type"] not in ("reserve", "settle", "resume"):
            continue
        name = entry["reservation"]
        if entry["type"] == "reserve":
            if name in charges:
                raise LedgerError(f"line {line.number}: the reservation {name} is reserved twice")
            charges[name] = Charge(
                reservation=name,
                line=line.number,
                time=float(entry["time"]),
                purpose=entry["purpose"],
                run_id=entry["run_id"],
                config_sha256=entry["config_sha256"],
                coins_sha256=str(entry.get("coins_sha256", "")),
                mechanisms=tuple(from_json(value) for value in entry["mechanisms"]),
                settled=False,
            )
            continue
        if name not in charges or charges[name].settled:
            raise LedgerError(f"line {line.number}: no open reservation {name}")
        if entry["type"] == "settle":
            executed = tuple(from_json(value) for value in entry["mechanisms"])
            if not _at_most(executed, charges[name].mechanisms):
                raise LedgerError(f"line {line.number}: the settlement is not part of the reservation")
            charges[name] = replace(charges[name], mechanisms=executed, settled=True, outcome_sha256=str(entry.get("outcome_sha256", "")))
    return tuple(charges.values())


def _open_charge(lines: tuple[Line, ...], reservation: str) -> Charge:
    for charge in _charges(lines):
        if charge.reservation == reservation and not charge.settled:
            return charge
    raise LedgerError(f"Expected an open reservation {reservation}, found none. Start a new run.")


def _at_most(executed: Sequence[Mechanism], reserved: Sequence[Mechanism]) -> bool:
    """Whether each executed mechanism is the reserved one, DP-SGD perhaps with fewer steps."""
    if len(executed) != len(reserved):
        return False
    for done, asked in zip(executed, reserved, strict=True):
        if isinstance(done, PoissonDpSgd) and isinstance(asked, PoissonDpSgd):
            if done.steps > asked.steps or replace(done, steps=asked.steps) != asked:
                return False
        elif done != asked:
            return False
    return True


def _stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _plain(value: float) -> float | str:
    return "inf" if value == math.inf else value
