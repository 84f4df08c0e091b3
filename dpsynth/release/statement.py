"""A hospital's word on candidates that it trained together with others: approved or refused, and what its ledger holds. Torch-free.

The schema is the wall: every field is a public number, a name of a fixed form or a digest of synthetic images, and a field that is not
listed here is refused. What the checks measured on patients has no place to stand in.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpsynth.artifacts import json_bytes
from dpsynth.errors import ArtifactError, LedgerError, SignatureError
from dpsynth.privacy.mechanism import Mechanism, MomentRelease, PoissonDpSgd, from_json
from dpsynth.signing import STATEMENT_TYPE, sign_statement, verify_envelope

PREDICATE_TYPE = "urn:dpsynth:site-statement:v1"
SUBJECT = "images"

Name = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9-]{0,39}$")]
Check = Annotated[str, Field(pattern="^[a-z]{1,30}$")]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Positive = Annotated[float, Field(gt=0)]
Epsilon = Annotated[float, Field(ge=0)] | Literal["inf"]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Word = Literal["pass", "flag", "fail", "inconclusive"]
_QUERY = set("abcdefghijklmnopqrstuvwxyz_")


class SiteStatement(BaseModel):
    """One site's word. epsilon and ledger_epsilon are at `delta`, which the study claims at; the first is of this study's mechanisms."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    version: Literal[1] = 1
    site: Name
    study: Name
    decision: Literal["approved", "refused"]
    images_sha256: Digest
    plan_sha256: Digest
    unit: Literal["patient", "image"]
    declared_patients: Count
    max_images_per_patient: Count
    rounds: tuple[Annotated[int, Field(ge=0, le=1_000_000)], ...] = Field(max_length=10_000)
    mechanisms: tuple[dict[str, Any], ...] = Field(max_length=64)
    delta: Annotated[float, Field(gt=0, lt=1)]
    epsilon: Epsilon
    ledger_epsilon: Epsilon
    budget_epsilon: Epsilon
    budget_delta: Annotated[float, Field(gt=0, lt=1)]
    attempt: Annotated[int, Field(ge=0, le=1_000_000)]  # 0: refused without a check
    max_attempts: Count
    required: tuple[Check, ...] = Field(max_length=32)
    outcomes: dict[Check, Word] = Field(max_length=32)  # of the checks whose word the site's policy makes public
    ledger_lines: Count
    ledger_sha256: Digest

    @model_validator(mode="after")
    def _plain(self) -> SiteStatement:
        if list(self.rounds) != sorted(set(self.rounds)):
            raise ValueError("rounds must rise")
        try:
            mechanisms = self.booked
        except (LedgerError, TypeError, ValueError) as error:
            raise ValueError(f"mechanisms: {error}") from error
        if not all(isinstance(mechanism, (MomentRelease, PoissonDpSgd)) for mechanism in mechanisms):
            raise ValueError("mechanisms: only those with noise are booked in a federation")
        queries = [query.name for mechanism in mechanisms if isinstance(mechanism, MomentRelease) for query in mechanism.queries]
        if any(not isinstance(name, str) or set(name) - _QUERY for name in queries):
            raise ValueError("mechanisms: a query has a name that no mechanism has")
        return self

    @property
    def booked(self) -> tuple[Mechanism, ...]:
        """The mechanisms of the study in the site's ledger, rounds merged."""
        return tuple(from_json(value) for value in self.mechanisms)

    @property
    def epsilons(self) -> tuple[float, float]:
        """epsilon and ledger_epsilon as numbers."""
        return float(self.epsilon), float(self.ledger_epsilon)


def plan_digest(plan: Mapping[str, Any]) -> str:
    """SHA-256 by which a statement names the plan of its study, given as JSON has it."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def plain(epsilon: float) -> float | str:
    """A number for JSON."""
    return "inf" if epsilon == math.inf else epsilon


def site_statement(fields: Mapping[str, Any]) -> SiteStatement:
    """The statement with these fields, as JSON has them. Raises ArtifactError that names the first field that has no place in it."""
    try:
        return SiteStatement.model_validate_json(json_bytes(dict(fields)))
    except (ValidationError, ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"Expected a site's statement, found something else: {where}: {first['msg']}.") from error


def sign_site_statement(statement: SiteStatement, private: Ed25519PrivateKey) -> dict[str, Any]:
    """DSSE envelope of the statement."""
    content = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": SUBJECT, "digest": {"sha256": statement.images_sha256}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": statement.model_dump(mode="json"),
    }
    return sign_statement(content, private)


def open_site_statement(envelope: object, public: Ed25519PublicKey) -> SiteStatement:
    """The statement, if this key signed it. Raises SignatureError, or ArtifactError when it is no such statement."""
    content = verify_envelope(envelope, public)
    if content.get("predicateType") != PREDICATE_TYPE or not isinstance(content.get("predicate"), dict):
        raise SignatureError(f"Expected a site's statement about candidates, found {content.get('predicateType')!r}.")
    statement = site_statement(content["predicate"])
    if content.get("subject") != [{"name": SUBJECT, "digest": {"sha256": statement.images_sha256}}]:
        raise SignatureError("The signed subject is not what the statement speaks of.")
    return statement
