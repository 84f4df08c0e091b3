"""The coordinator's side: rounds over a fixed list of sites, with a quorum, a deadline, checks of every answer and a checkpoint each round.

It sees noised numbers only, and what it does with them is post-processing. Its requests are made from the checkpoint and signed
deterministically, so a coordinator that was killed asks the same questions again, byte by byte, and no site charges twice.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from dpsynth.artifacts import read_json, storage_errors, write_bytes, write_json
from dpsynth.errors import ArtifactError, DpsynthError, RefusedError
from dpsynth.model.moment_release import QUERIES, count_stddev, counts_of, raw_counts, told_by
from dpsynth.privacy.mechanism import MomentRelease, PoissonDpSgd, from_json
from dpsynth.signing import key_id
from federated.combine import (
    averaged,
    combined_weights,
    counts_problem,
    largest_patients,
    largest_update,
    odd_sites,
    sums_problem,
    update_norm,
)
from federated.federation import Federation
from federated.messages import (
    FIRST_TRAINING,
    REASONS,
    TRANSIENT,
    UNREADABLE,
    Arrays,
    Code,
    Facts,
    Plan,
    Refused,
    Reply,
    decode_reply,
    encode_request,
    require_arrays,
    signed_digest,
)
from federated.rounds import SUMS, TOLD, Model, moments_arrays, told_arrays
from federated.study_folder import EVENTS, KNOWN, QUESTION, STUDY_FILE, append_line

EMA, COUNTS = "ema.", "counts."
_LARGEST_REPLY_BYTES = 1 << 30
_SILENT = "no answer within the deadline"
_MAY_CHANGE = (*TRANSIENT, Code.HOURS, _SILENT)  # reasons that pass by themselves; the others need another plan or policy
_MAY_BE_CHARGED = (Code.LOST, Code.ORDER, Code.MESSAGE_REUSED)  # refusals of a round that an earlier message may have booked


class QuorumLost(DpsynthError):
    """Too few sites gave a usable answer; the message names each site's reason."""


class QuorumRefused(QuorumLost, RefusedError):
    """As many sites as the quorum can spare gave an answer that stays the same however often they are asked."""


class Transport(Protocol):
    """Carries frames to sites and back."""

    def __call__(self, requests: Mapping[str, bytes], *, deadline_seconds: float) -> Mapping[str, bytes]:
        """Replies by site; a site that gave none in time is missing."""
        ...


@dataclass(frozen=True, kw_only=True)
class Event:
    """What became of one question: outcome is ok, refused, unusable or no-reply. round: none for whether a site takes part."""

    round: int | None
    site: str
    outcome: str
    reason: str = ""


def quiet(event: Event) -> None:
    """The report of programs that want none."""
    del event


Problem = Callable[[str, Reply, Arrays], str]  # why a site's answer cannot be used; empty when it can


@dataclass(kw_only=True)
class State:
    """What the coordinator knows after a round. arrays, by prefixed name: while moments are asked for, what the queries so far have told
    and each site's noised counts; then moments, weights and their running average.
    """

    round: int
    arrays: dict[str, NDArray[Any]]


@dataclass(kw_only=True)
class Coordinator:
    """One study. `model` holds the public constants."""

    federation: Federation
    plan: Plan
    model: Model
    private: Ed25519PrivateKey
    transport: Transport
    folder: Path
    report: Callable[[Event], None] = quiet
    pause: Callable[[float], object] = time.sleep  # between two questions for the same answer, seconds
    facts: dict[str, Facts] = field(default_factory=dict)  # by site, from its last answer
    asked: dict[str, list[int]] = field(default_factory=dict)  # by site, the rounds that may have been released
    answered: dict[str, list[int]] = field(default_factory=dict)  # by site, the rounds of which a usable answer came
    attempts: dict[str, int] = field(default_factory=dict)  # by "site/round"
    questions: dict[str, int] = field(default_factory=dict)  # by "site/round": how often it was asked for since it was last uncounted

    def run(self, initial: Callable[[], Arrays]) -> State:
        """All rounds that are missing. initial: makes the net's public weights, which takes minutes; called when the sites are known to be
        there, and not at all once rounds of training have begun. Raises QuorumLost; the same call goes on from the last checkpoint.
        """
        self._remember()
        state = self._last()
        if state is None:
            self._ask(0, "join", {})
            state = State(round=-1, arrays={})
        weights = initial() if state.round + 1 < FIRST_TRAINING else {}
        while state.round + 1 < FIRST_TRAINING + self.federation.rounds:
            state = self._train(state) if state.round + 1 >= FIRST_TRAINING else self._query(state, weights)
            self._save(state)
        return state

    @property
    def asks_no_more(self) -> bool:
        """Whether all rounds are done."""
        found = self._checkpoints()
        return bool(found) and _number(found[-1]) + 1 >= FIRST_TRAINING + self.federation.rounds

    def require_same(self) -> None:
        """Raise ArtifactError when the study began otherwise: sites then hold charges that another plan or key cannot go on with."""
        path, own = self.folder / STUDY_FILE, self._began()
        before = read_json(path) if path.is_file() else own
        if before["coordinator"] != own["coordinator"]:
            raise ArtifactError(
                f"The study {self.federation.study} began with another signing key, {before['coordinator'][:16]}. Put that one back, or "
                "name a new study."
            )
        if changed := [name for name, value in own["plan"].items() if before["plan"].get(name) != value]:
            was = "; ".join(f"{name} was {before['plan'].get(name)}, is {own['plan'][name]}" for name in changed)
            raise ArtifactError(
                f"The study {self.federation.study} began with another plan, and sites take no other: {was}. Put back what was, or name a "
                "new study."
            )

    def _began(self) -> dict[str, Any]:
        plan = self.plan.model_dump(mode="json")
        return {"study": self.federation.study, "plan": plan, "coordinator": key_id(self.private.public_key())}

    def _query(self, state: State, initial: Arrays) -> State:
        """One query of the moments: the sum over the sites of their noised sums, read as the sum of one site with all patients is.

        The noise of K sites is that of one times sqrt(K). A site whose counts are not known, since it did not answer the first query, is
        asked no further ones; should one fail later, the others' counts go with the others' sums.
        """
        number, reference = state.round + 1, self.model.reference
        query, release = QUERIES[number], self.model.release(self.plan)
        known = {name: array for name, array in state.arrays.items() if name.startswith(TOLD)}
        counts = {name.removeprefix(COUNTS): array for name, array in state.arrays.items() if name.startswith(COUNTS)}
        told, stddev = self.model.told(known, query), count_stddev(release, reference)
        expected = self.model.expected_sums(query, told)

        def problem(site: str, reply: Reply, arrays: Arrays) -> str:
            require_arrays(arrays, expected, largest=math.inf)
            sums = arrays[SUMS]
            own = counts.get(site, raw_counts(sums, reference))
            declared = min(known.declared_patients for known in (reply.facts, self.facts.get(site), self.federation.config.data) if known)
            found = counts_problem(own, stddev=stddev, declared_patients=declared)
            patients = largest_patients(own, stddev=stddev)
            clip_norm, noise = release.query(query).clip_norm, release.noise_stddev(query)
            return found or sums_problem(sums, clip_norm=clip_norm, stddev=noise, patients=patients)

        usable = self._ask(number, "moments", known, problem, sites=None if number == 0 else tuple(counts))
        more = math.sqrt(len(usable))
        counts = counts or {site: raw_counts(arrays[SUMS], reference) for site, arrays in usable.items()}
        answering = replace(told, counts=counts_of(np.sum([counts[site] for site in usable], axis=0), stddev=more * stddev))
        total = np.sum([arrays[SUMS] for arrays in usable.values()], axis=0)
        cells = self.model.config.data.cells
        groups = cells.labels(np.arange(len(cells)))
        after = told_by(query, total, answering, groups, reference, lambda name: more * release.noise_stddev(name))
        after = replace(after, counts=after.counts if told.counts is None else told.counts)
        if number + 1 < FIRST_TRAINING:
            return State(round=number, arrays={**told_arrays(after), **{COUNTS + site: array for site, array in counts.items()}})
        averages = {EMA + name: initial[name] for name in self.model.expected_weights(trainable=True)}
        return State(round=number, arrays={**moments_arrays(after.moments(reference)), **initial, **averages})

    def _train(self, state: State) -> State:
        before = {name: array for name, array in state.arrays.items() if not name.startswith(EMA)}
        expected = self.model.expected_weights(trainable=True)
        size = sum(int(np.prod(shape)) for _, shape in expected.values())
        limit = largest_update(learning_rate=self.plan.learning_rate, steps=self.plan.steps_per_round, num_weights=size)

        def problem(_site: str, _reply: Reply, arrays: Arrays) -> str:
            require_arrays(arrays, expected)
            norm = update_norm(before, arrays)
            return "" if norm <= limit else f"its update is {norm / limit:.3g} times as long as any honest one can be"

        number = state.round + 1
        usable = self._ask(number, "train", before, problem)
        norms = {site: update_norm(before, arrays) for site, arrays in usable.items()}
        for site in odd_sites(norms):
            self._note(number, site, "unusable", "its update is much longer or shorter than those of the others, and was left out")
            del usable[site]
        self._require_quorum(number, usable, {})
        new = combined_weights(usable, {site: self.federation.weight(site) for site in usable})
        average = {name: state.arrays[EMA + name] for name in new}
        steps = self.plan.steps_per_round
        done = (number - FIRST_TRAINING) * steps
        average = averaged(average, new, steps_done=done, steps=steps, decay=self.federation.config.diffusion.ema_decay)
        return State(round=number, arrays={**state.arrays, **new, **{EMA + name: array for name, array in average.items()}})

    def _ask(
        self, number: int, kind: str, arrays: Arrays, problem: Problem = lambda *_: "", *, sites: Sequence[str] | None = None
    ) -> dict[str, Arrays]:
        """Usable arrays by site, of `sites` or of all. Those that gave no answer are asked again with the same message."""
        usable: dict[str, Arrays] = {}
        reasons: dict[str, str] = {}
        waiting = [site for site in self.federation.asked_sites if sites is None or site in sites]
        for attempt in range(self.federation.retries + 1):
            if attempt:
                self.pause(self.federation.retry_pause_seconds)
            requests = {site: self._request(site, number, kind, arrays) for site in waiting}
            if kind != "join":
                self._count(number, waiting)
            begun = datetime.now(UTC)
            until = begun + timedelta(seconds=self.federation.deadline_seconds)
            write_json(
                self.folder / QUESTION,
                {"round": None if kind == "join" else number, "sites": waiting, "since": _time(begun), "until": _time(until)},
            )
            replies = self.transport(requests, deadline_seconds=self.federation.deadline_seconds)
            (self.folder / QUESTION).unlink(missing_ok=True)
            waiting = []
            for site, request in requests.items():
                outcome, reason, found = self._read(site, request, replies.get(site), problem)
                if outcome == "refused" and kind != "join":
                    self._refused(site, number, charged=reason.partition(":")[0] in _MAY_BE_CHARGED)
                if outcome == "ok" and kind != "join":
                    self.answered[site] = sorted({*self.answered.get(site, []), number})
                self._note(None if kind == "join" else number, site, outcome, reason)
                if found is not None:
                    usable[site] = found
                    reasons.pop(site, None)
                else:
                    reasons[site] = reason
                    waiting += [site] if outcome == "no-reply" else []
            if not waiting or len(usable) >= self.federation.quorum:
                break
        self._require_quorum(number, usable, reasons)
        return usable

    def _read(self, site: str, request: bytes, raw: bytes | None, problem: Problem) -> tuple[str, str, Arrays | None]:
        """Outcome, reason, and the arrays when they are usable."""
        if raw is None:
            return "no-reply", _SILENT, None
        try:
            reply, arrays = decode_reply(raw, largest_bytes=_LARGEST_REPLY_BYTES)
            own = reply.request_sha256 == signed_digest(request, public=self.private.public_key())
            if not own and (reply.code is None or reply.request_sha256 != UNREADABLE):
                return "unusable", "the answer is to another question", None
            if reply.code is not None:
                return ("no-reply" if reply.code in TRANSIENT else "refused"), f"{reply.code.value}: {REASONS[reply.code]}", None
            found = problem(site, reply, arrays)
        except Refused as error:
            return "unusable", f"the answer cannot be used ({error})", None
        if found:
            return "unusable", found, None
        if reply.facts is not None:
            self.facts[site] = reply.facts
            self._recount(site)
        return "ok", "", arrays

    def _recount(self, site: str) -> None:
        """Count all rounds that the site ever refused when it states more charges than were counted: answers of sites are not signed, and
        whoever carries them can refuse in a site's name what it has booked.
        """
        stated = [from_json(value) for value in self.facts[site].charged]
        moments = sum(len(mechanism.queries) for mechanism in stated if isinstance(mechanism, MomentRelease))
        steps = sum(mechanism.steps for mechanism in stated if isinstance(mechanism, PoissonDpSgd))
        if moments + steps // self.plan.steps_per_round > len(self.asked.get(site, [])):
            refused = [int(number) for name, _, number in (key.rpartition("/") for key in self.attempts) if name == site]
            self.asked[site] = sorted({*self.asked.get(site, []), *refused})

    def _count(self, number: int, sites: list[str]) -> None:
        """Note before asking that these sites may have released the round."""
        for site in sites:
            rounds = self.asked.setdefault(site, [])
            rounds += [number] if number not in rounds else []
            self.questions[f"{site}/{number}"] = self.questions.get(f"{site}/{number}", 0) + 1
        self._keep()

    def _refused(self, site: str, number: int, *, charged: bool) -> None:
        """A refusal is final for its message; should the round be asked for again, it is with a new one.

        The round is uncounted only when nobody can have booked it: its first question was refused, by a code that comes before a charge.
        """
        if not charged and self.questions.get(f"{site}/{number}") == 1 and number in self.asked.get(site, []):
            self.asked[site].remove(number)
            del self.questions[f"{site}/{number}"]
        self.attempts[f"{site}/{number}"] = self.attempts.get(f"{site}/{number}", 1) + 1

    def _request(self, site: str, number: int, kind: str, arrays: Arrays) -> bytes:
        attempt = self.attempts.get(f"{site}/{number}", 1)
        fields = {
            "kind": kind,
            "study": self.federation.study,
            "site": site,
            "message_id": f"{kind}-{number}-{attempt}",
            "round": number,
            "plan": self.plan,
        }
        return encode_request(fields, arrays, private=self.private)

    def _require_quorum(self, number: int, usable: Mapping[str, Arrays], reasons: Mapping[str, str]) -> None:
        if len(usable) < self.federation.quorum:
            why = "; ".join(f"{site}: {reason}" for site, reason in reasons.items())
            others = sum(reason.partition(":")[0] in _MAY_CHANGE for reason in reasons.values())
            found = f"Round {number}: {len(usable)} usable answers, {self.federation.quorum} are needed. {why}. "
            if len(usable) + others >= self.federation.quorum:
                more = "Mend the cause and run the same command: it goes on from here, and no site charges a round twice."
                raise QuorumLost(found + more)
            raise QuorumRefused(
                found + "A site says the same however often it is asked. Ask it, begin a study with another plan, or go on without it: "
                "left_out and quorum in the study's file may change at any time."
            )

    def _note(self, number: int | None, site: str, outcome: str, reason: str) -> None:
        event = Event(round=number, site=site, outcome=outcome, reason=reason)
        append_line(self.folder / EVENTS, {**asdict(event), "time": _time(datetime.now(UTC))})
        self._keep()
        self.report(event)

    def _keep(self) -> None:
        facts = {site: known.model_dump(mode="json") for site, known in self.facts.items()}
        write_json(
            self.folder / KNOWN,
            {"facts": facts, "asked": self.asked, "answered": self.answered, "attempts": self.attempts, "questions": self.questions},
        )

    def _remember(self) -> None:
        """What an earlier process of this study knew. Raises ArtifactError when the folder is another study's."""
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.require_same()
        write_json(self.folder / STUDY_FILE, self._began())
        if (self.folder / KNOWN).is_file():
            known = read_json(self.folder / KNOWN)
            self.facts = {site: Facts.model_validate_json(json.dumps(value)) for site, value in known["facts"].items()}
            self.asked, self.answered = known["asked"], known["answered"]
            self.attempts, self.questions = known["attempts"], known["questions"]
        elif self._checkpoints():
            raise ArtifactError("sites.json is missing beside the checkpoints, so nobody knows what the sites were asked for. Restore it.")

    def _save(self, state: State) -> None:
        arrays = {name: np.ascontiguousarray(array) for name, array in state.arrays.items()}
        write_bytes(self.folder / f"round-{state.round:06d}.safetensors", save(arrays))

    def _last(self) -> State | None:
        found = self._checkpoints()
        if not found:
            return None
        try:
            return State(round=_number(found[-1]), arrays=dict(load_file(found[-1])))
        except (OSError, ValueError, SafetensorError) as error:
            raise ArtifactError(
                f"The checkpoint {found[-1].name} cannot be read. Remove it: the study goes on from the one before."
            ) from error

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("round-*.safetensors"))


def require_quorum_online(federation: Federation, online: Collection[str]) -> list[str]:
    """The sites whose node is not connected. Raises QuorumLost when the others are too few, before any of them is asked."""
    away = [site for site in federation.asked_sites if site not in online]
    if len(federation.asked_sites) - len(away) < federation.quorum:
        raise QuorumLost(
            f"Not connected: {', '.join(away)}; {federation.quorum} of {len(federation.asked_sites)} sites are needed. Their IT starts "
            "`dpsynth-federation node`; then run the same command."
        )
    return away


def _number(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("round-"))


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
