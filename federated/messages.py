"""What travels between a coordinator and a guard: JSON with a schema, raw arrays behind it, and a signature over both.

Frame: 4 bytes magic, length of the head (4 bytes, big-endian), head, body. The head of a request is a DSSE envelope of an in-toto
statement that holds the request and the body's SHA-256; that of a reply is JSON. The body is the arrays' bytes, one after the other,
little-endian. Nothing is unpickled, and nothing is parsed that an approved coordinator did not sign, but the envelope itself.
A refusal is a code with a fixed sentence: no number, path or exception text can get into it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpsynth.config import AnatomyName, ClipNorm
from dpsynth.errors import RefusedError, SignatureError
from dpsynth.model.moment_release import QUERIES
from dpsynth.release.statement import plan_digest
from dpsynth.signing import STATEMENT_TYPE, key_id, sign_statement, verify_envelope

FIRST_TRAINING = len(QUERIES)  # number of the first round of DP-SGD; round n before it asks for query n of the moments
PREDICATE = "https://dpsynth.dev/federation/request/v1"
LARGEST_HEAD_BYTES = 1 << 18
UNREADABLE = "0" * 64  # stands in a refusal for the digest of a request that could not be read
LARGEST_VALUE = 1e6  # of any number in an array: far above what training makes, far below what overflows
_MAGIC = b"DPSF"
_PREFIX = struct.Struct(">4sI")

Arrays = Mapping[str, NDArray[Any]]
Model = TypeVar("Model", bound=BaseModel)
Name = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9-]{0,39}$")]
MessageId = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9-]{0,79}$")]
Positive = Annotated[float, Field(gt=0, lt=1e6)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Code(StrEnum):
    """Why a guard did not do what it was asked. The sentence that goes with each is in `REASONS`."""

    MALFORMED = "malformed"
    TOO_LARGE = "too-large"
    COORDINATOR = "coordinator"
    RECIPIENT = "recipient"
    STUDIES = "studies"
    STUDY_TAKEN = "study-taken"
    PLAN_CHANGED = "plan-changed"
    MESSAGE_REUSED = "message-reused"
    ORDER = "order"
    APP = "app"
    HOURS = "hours"
    LAYOUT = "layout"
    MODEL = "model"
    NOISE = "noise"
    CLIP = "clip"
    SAMPLING = "sampling"
    STEPS = "steps"
    BUDGET = "budget"
    STUDY_BUDGET = "study-budget"
    ARRAYS = "arrays"
    LOST = "lost"
    FAILED = "failed"
    UNREACHABLE = "unreachable"
    CARRIER = "carrier"


REASONS = {
    Code.MALFORMED: "the message does not follow the schema",
    Code.TOO_LARGE: "the message is larger than the site allows",
    Code.COORDINATOR: "no approved coordinator signed the message",
    Code.RECIPIENT: "the message is for another site",
    Code.STUDIES: "the site takes part in no further study",
    Code.STUDY_TAKEN: "another coordinator opened a study of this name",
    Code.PLAN_CHANGED: "the plan is not the one that the study began with",
    Code.MESSAGE_REUSED: "another message had this id",
    Code.ORDER: "a round of this number or a later one was booked before",
    Code.APP: "the site has not approved this app",
    Code.HOURS: "the site is closed at this hour",
    Code.LAYOUT: "classes, attributes or image size differ from the site's data",
    Code.MODEL: "the site's policy does not allow this model",
    Code.NOISE: "less noise than the site's policy demands",
    Code.CLIP: "a larger clip norm than the site's policy allows",
    Code.SAMPLING: "a sampling probability outside the site's policy",
    Code.STEPS: "more steps or rounds than the site's policy allows",
    Code.BUDGET: "the budget of the site's data does not cover it",
    Code.STUDY_BUDGET: "the site's policy allows no study to spend so much",
    Code.ARRAYS: "arrays are missing, of another shape or type, not finite, or too large in value",
    Code.LOST: "the site cannot go on with what it was charged for in this study; its charges stay",
    Code.FAILED: "the site failed; its own log says why",
    Code.UNREACHABLE: "the guard of the site does not answer",
    Code.CARRIER: "Flower lost the message: the site's node is not connected, or its app ended",
}
TRANSIENT = (
    Code.FAILED,
    Code.UNREACHABLE,
    Code.CARRIER,
)  # asking again with the same message may succeed; every other answer is final for its message


class Refused(RefusedError):
    """The guard says no; `code` is all that leaves, and `detail` is for its own log."""

    def __init__(self, code: Code, detail: str = "") -> None:
        super().__init__(f"{code.value}: {REASONS[code]}" + (f" ({detail})" if detail else ""))
        self.code = code


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Plan(_Message):
    """What a study wants of every site, fixed with its first message: data layout, model, and the mechanisms of all rounds.

    sites: who is asked. Each site's statement is bound to the digest, so none of them can be left out of the record afterwards.
    """

    sites: tuple[Name, ...] = Field(min_length=1, max_length=200)
    classes: tuple[Annotated[str, Field(min_length=1, max_length=80)], ...] = Field(min_length=1, max_length=64)
    attributes: tuple[tuple[str, tuple[str, ...]], ...] = Field(max_length=16)
    spatial_shape: tuple[Count, ...] = Field(min_length=2, max_length=3)
    channels: Literal[1, 3]
    low_frequencies: Annotated[int, Field(ge=1, le=256)]
    net_channels: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field(min_length=1, max_length=6)
    trainable: Literal["all", "small", "none"]
    draws: Annotated[int, Field(ge=1, le=64)]
    learning_rate: Positive
    anatomies: tuple[AnatomyName, ...] = Field(min_length=1, max_length=len(get_args(AnatomyName)))
    num_phantoms: Annotated[int, Field(ge=10, le=20_000)]
    public_seed: Annotated[int, Field(ge=0, le=2**32 - 1)]
    moments_noise_multiplier: Positive
    noise_multiplier: Positive | None  # of DP-SGD; none where no round trains
    clip_norm: ClipNorm
    sampling_probability: Annotated[float, Field(gt=0, le=1)]
    steps_per_round: Count
    rounds: Annotated[int, Field(ge=0, le=1_000_000)]
    app_sha256: Digest | None = None

    @model_validator(mode="after")
    def _trained_with_noise(self) -> Plan:
        if len({self.noise_multiplier is None, self.rounds == 0, self.trainable == "none"}) > 1:
            raise ValueError("rounds of DP-SGD, what they train and their noise are there together or not at all")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of its JSON form."""
        return plan_digest(self.model_dump(mode="json"))


class ArraySpec(_Message):
    """Name, type and shape of one array of the body."""

    name: Annotated[str, Field(pattern="^[A-Za-z0-9_.]{1,200}$")]
    dtype: Literal["<f4", "<f8"]
    shape: tuple[Annotated[int, Field(ge=0, le=1 << 28)], ...] = Field(max_length=8)

    @property
    def num_bytes(self) -> int:
        """Length in the body."""
        size = int(self.dtype[-1])
        for side in self.shape:
            size *= side
        return size


class _WithArrays(_Message):
    arrays: tuple[ArraySpec, ...] = Field(max_length=4096)

    @model_validator(mode="after")
    def _different_names(self) -> _WithArrays:
        if len({spec.name for spec in self.arrays}) != len(self.arrays):
            raise ValueError("two arrays have one name")
        return self


class Request(_WithArrays):
    """One question to one site: round by round the queries of the moments, then DP-SGD; join touches no data and costs nothing."""

    protocol: Literal[3] = 3
    kind: Literal["join", "moments", "train"]
    study: Name
    site: Name
    message_id: MessageId
    round: Annotated[int, Field(ge=0, le=1_000_000)]
    plan: Plan
    body_sha256: Digest

    @model_validator(mode="after")
    def _of_kind_and_plan(self) -> Request:
        if (self.kind == "train") != (self.round >= FIRST_TRAINING) or (self.kind == "join" and self.round > 0):
            raise ValueError(f"join has round 0, moments have rounds up to {FIRST_TRAINING - 1}, train has the later ones")
        if self.site not in self.plan.sites:
            raise ValueError("the plan does not name the site")
        return self


class Facts(_Message):
    """Public numbers of a site, none of them computed from patients. charged: this study's mechanisms in the site's ledger."""

    unit: Literal["patient", "image"]
    declared_patients: Count
    max_images_per_patient: Count
    delta: Annotated[float, Field(gt=0, lt=1)]
    charged: tuple[dict[str, Any], ...] = Field(max_length=64)
    ledger_epsilon: Annotated[float, Field(ge=0)] | Literal["inf"]  # of everything on the site's data, other runs included


class Reply(_WithArrays):
    """A guard's answer. What it says of the ledger is a claim; the record is the ledger."""

    protocol: Literal[3] = 3
    outcome: Literal["ok", "refused"]
    code: Code | None
    reason: str
    request_sha256: Digest
    facts: Facts | None
    body_sha256: Digest


@dataclass(frozen=True, kw_only=True)
class Signed:
    """A request that an approved coordinator signed. digest: SHA-256 of the statement, body included. key: who signed."""

    request: Request
    arrays: dict[str, NDArray[Any]]
    digest: str
    key: str


def encode_request(request: Mapping[str, Any], arrays: Arrays, *, private: Ed25519PrivateKey) -> bytes:
    """Frame of a request whose fields are given without `arrays` and `body_sha256`. Equal arguments give equal bytes."""
    specs, body = _packed(arrays)
    digest = hashlib.sha256(body).hexdigest()
    checked = Request.model_validate({**request, "arrays": tuple(specs), "body_sha256": digest})
    statement = {
        "_type": STATEMENT_TYPE,
        "predicateType": PREDICATE,
        "subject": [{"name": "body", "digest": {"sha256": digest}}],
        "predicate": checked.model_dump(mode="json"),
    }
    return _framed(json.dumps(sign_statement(statement, private), sort_keys=True).encode(), body)


def decode_request(raw: bytes, *, coordinators: Sequence[Ed25519PublicKey], largest_bytes: int) -> Signed:
    """The request in a frame. Raises Refused: malformed, too large, or signed by none of `coordinators`."""
    head, body = _unframed(raw, largest_bytes)
    statement, key = _verified(_json(head), coordinators)
    if set(statement) != {"_type", "predicateType", "subject", "predicate"} or statement["predicateType"] != PREDICATE:
        raise Refused(Code.MALFORMED)
    canonical = json.dumps(statement, sort_keys=True).encode()
    request = _validated(Request, statement["predicate"])
    arrays = _unpacked(request.arrays, body, request.body_sha256)
    return Signed(request=request, arrays=arrays, digest=hashlib.sha256(canonical).hexdigest(), key=key)


def encode_reply(*, request_sha256: str, facts: Facts, arrays: Arrays) -> bytes:
    """Frame of an answer to the request with that digest."""
    specs, body = _packed(arrays)
    return _reply(code=None, request_sha256=request_sha256, facts=facts, specs=specs, body=body)


def encode_refusal(code: Code, *, request_sha256: str = UNREADABLE) -> bytes:
    """Frame of a refusal; zeros stand for a request that could not be read."""
    return _reply(code=code, request_sha256=request_sha256, facts=None, specs=[], body=b"")


def decode_reply(raw: bytes, *, largest_bytes: int) -> tuple[Reply, dict[str, NDArray[Any]]]:
    """A reply with its arrays. Raises Refused(MALFORMED or TOO_LARGE): a site is trusted with no more than a coordinator."""
    head, body = _unframed(raw, largest_bytes)
    reply = _validated(Reply, _json(head))
    if not (reply.outcome == "ok") == (reply.code is None) == (reply.facts is not None):
        raise Refused(Code.MALFORMED)
    return reply, _unpacked(reply.arrays, body, reply.body_sha256)


def signed_digest(raw: bytes, *, public: Ed25519PublicKey) -> str:
    """Digest by which replies name the request in this frame, for the coordinator that made it."""
    return decode_request(raw, coordinators=(public,), largest_bytes=len(raw)).digest


def require_arrays(arrays: Arrays, expected: Mapping[str, tuple[str, tuple[int, ...]]], *, largest: float = LARGEST_VALUE) -> None:
    """Raise Refused(ARRAYS) unless `arrays` are exactly the expected {name: (dtype, shape)}, finite and at most `largest` in value."""
    if set(arrays) != set(expected):
        raise Refused(Code.ARRAYS)
    for name, (dtype, shape) in expected.items():
        array = arrays[name]
        if array.dtype.newbyteorder("<").str != dtype or array.shape != shape or not np.isfinite(array).all():
            raise Refused(Code.ARRAYS)
        if array.size and float(np.abs(array).max()) > largest:
            raise Refused(Code.ARRAYS)


def _reply(*, code: Code | None, request_sha256: str, facts: Facts | None, specs: list[ArraySpec], body: bytes) -> bytes:
    reply = Reply(
        outcome="ok" if code is None else "refused",
        code=code,
        reason="" if code is None else REASONS[code],
        request_sha256=request_sha256,
        facts=facts,
        arrays=tuple(specs),
        body_sha256=hashlib.sha256(body).hexdigest(),
    )
    return _framed(json.dumps(reply.model_dump(mode="json"), sort_keys=True, allow_nan=False).encode(), body)


def _framed(head: bytes, body: bytes) -> bytes:
    if len(head) > LARGEST_HEAD_BYTES:
        raise Refused(Code.TOO_LARGE)
    return _PREFIX.pack(_MAGIC, len(head)) + head + body


def _unframed(raw: bytes, largest_bytes: int) -> tuple[bytes, bytes]:
    if len(raw) > largest_bytes:
        raise Refused(Code.TOO_LARGE)
    if len(raw) < _PREFIX.size:
        raise Refused(Code.MALFORMED)
    magic, length = _PREFIX.unpack_from(raw)
    if magic != _MAGIC or length > min(LARGEST_HEAD_BYTES, len(raw) - _PREFIX.size):
        raise Refused(Code.MALFORMED)
    return raw[_PREFIX.size : _PREFIX.size + length], raw[_PREFIX.size + length :]


def _json(head: bytes) -> Any:
    try:
        return json.loads(head)
    except (ValueError, RecursionError):
        raise Refused(Code.MALFORMED) from None


def _verified(envelope: Any, coordinators: Sequence[Ed25519PublicKey]) -> tuple[dict[str, Any], str]:
    """The signed statement, parsed only after its signature holds, and the id of the key."""
    for public in coordinators:
        try:
            return verify_envelope(envelope, public), key_id(public)
        except SignatureError:
            continue
        except (ValueError, RecursionError):
            raise Refused(Code.MALFORMED) from None
    raise Refused(Code.COORDINATOR)


def _validated(model: type[Model], value: Any) -> Model:
    try:
        return model.model_validate_json(json.dumps(value))  # JSON mode: lists are tuples, and nothing else is converted
    except (ValidationError, ValueError, RecursionError):
        raise Refused(Code.MALFORMED) from None


def _packed(arrays: Arrays) -> tuple[list[ArraySpec], bytes]:
    specs, parts = [], []
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        specs.append(ArraySpec.model_validate({"name": name, "dtype": little.dtype.str, "shape": array.shape}))
        parts.append(little.tobytes())
    return specs, b"".join(parts)


def _unpacked(specs: Sequence[ArraySpec], body: bytes, digest: str) -> dict[str, NDArray[Any]]:
    if sum(spec.num_bytes for spec in specs) != len(body) or hashlib.sha256(body).hexdigest() != digest:
        raise Refused(Code.MALFORMED)
    arrays, offset = {}, 0
    for spec in specs:
        count = spec.num_bytes // int(spec.dtype[-1])
        arrays[spec.name] = np.frombuffer(body, dtype=spec.dtype, count=count, offset=offset).reshape(spec.shape)
        offset += spec.num_bytes
    return arrays
