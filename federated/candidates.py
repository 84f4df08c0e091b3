"""Candidates on their way from the coordinator to the sites that trained them: one file, carried in whatever way a hospital takes files.

A zip archive, nothing in it compressed or pickled by us: header.dsse.json (signed by the coordinator: study, plan, layout, digests of the
other two), candidates.npz (as the run folder holds it), moments.npz (as released, against which single images are screened). All of it is
post-processing of what the sites released with noise, so it holds nothing private; it is not yet released either.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dpsynth.artifacts import RunFolder, json_bytes, read_json, require_new, write_bytes
from dpsynth.config import DataConfig, learnt_shape, parse_config
from dpsynth.data.candidates import FILE, Candidates, load_candidates, withheld
from dpsynth.data.images_digest import images_digest
from dpsynth.errors import ArtifactError, ConfigError, SignatureError, UsageError
from dpsynth.model.generator import Generator
from dpsynth.model.moments import Moments, frequencies
from dpsynth.release.federated import load_federated_run, required_checks
from dpsynth.release.statement import Check, plan_digest
from dpsynth.signing import STATEMENT_TYPE, key_id, load_private, sign_statement, verify_envelope
from federated.messages import Digest, Name
from federated.study_folder import STUDY_FILE

PREDICATE = "urn:dpsynth:candidates:v1"
_HEADER, _MOMENTS = "header.dsse.json", "moments.npz"
_LARGEST_HEADER_BYTES = 1 << 20
_ATTRIBUTE = "attribute_"

Count = Annotated[int, Field(ge=0, le=1_000_000)]


class Header(BaseModel):
    """What the coordinator signs beside the digests."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    version: Literal[1] = 1
    study: Name
    plan_sha256: Digest
    images_sha256: Digest
    delta: Annotated[float, Field(gt=0, lt=1)]
    withheld: Count
    low_frequencies: Annotated[int, Field(ge=1, le=256)]
    required: tuple[Check, ...] = Field(max_length=32)


@dataclass(frozen=True, kw_only=True)
class Carried:
    """Candidates with what the coordinator signed about them. key: id of the key that signed; statement_sha256: of all that it signed."""

    header: Header
    candidates: Candidates
    moments: Moments
    key: str
    statement_sha256: str


def coordinators_key(folder: Path) -> Ed25519PrivateKey:
    """The key that signs for a coordinator. Raises ConfigError when the folder is none of a coordinator, or SignatureError."""
    path = folder / "coordinator" / "signing.key"
    if not path.is_file():
        raise ConfigError(f"Expected the folder of `dpsynth-federation init-ca` at {folder}, found no {path}. Name that one.")
    return load_private(path)


def study_key(folder: Path, run_path: Path) -> Ed25519PrivateKey:
    """The key under which the run's study was asked, from the coordinator's folder. Sites take its candidates from no other.

    Raises ArtifactError or SignatureError when the folder is not the one that ran the study.
    """
    private, counted = coordinators_key(folder), load_federated_run(RunFolder.open(run_path))
    path = folder / "studies" / counted.study / STUDY_FILE
    began = read_json(path) if path.is_file() else None
    if began is None or plan_digest(began["plan"]) != counted.plan_sha256:
        raise ArtifactError(f"{folder} did not run the study {counted.study} of {run_path}. Name the --folder that `run` was given.")
    if began["coordinator"] != key_id(private.public_key()):
        raise SignatureError(
            f"The study {counted.study} ran under another key than the present one of {folder}: {began['coordinator'][:16]}, not "
            f"{key_id(private.public_key())[:16]}. Put that one back."
        )
    return private


def pack(run_path: Path, *, out: Path, private: Ed25519PrivateKey) -> Header:
    """Write the candidates of a federated run to `out`. Raises ArtifactError when they were not drawn, or when something is there."""
    require_new(out, kind="file")
    run = RunFolder.open(run_path)
    counted, config, candidates = load_federated_run(run), parse_config(run.config_text, base=run.path), load_candidates(run)
    moments = Generator.load(run.folder("train")).moments
    header = Header(
        study=counted.study,
        plan_sha256=counted.plan_sha256,
        images_sha256=images_digest(candidates),
        delta=counted.spending.delta,
        withheld=withheld(run),
        low_frequencies=moments.low_frequencies,
        required=required_checks(config),
    )
    members = {FILE: (run.folder("generate") / FILE).read_bytes(), _MOMENTS: _npz(moments.to_arrays())}
    statement = {
        "_type": STATEMENT_TYPE,
        "predicateType": PREDICATE,
        "subject": [{"name": name, "digest": {"sha256": hashlib.sha256(content).hexdigest()}} for name, content in members.items()],
        "predicate": header.model_dump(mode="json"),
    }
    envelope = json.dumps(sign_statement(statement, private), sort_keys=True).encode()
    write_bytes(out, _zip({_HEADER: envelope, **members}))
    return header


def unpack(path: Path, *, coordinators: Sequence[Ed25519PublicKey], data: DataConfig, largest_bytes: int) -> Carried:
    """Candidates in the layout of `data`. Nothing but the envelope is parsed before a coordinator's signature over it holds.

    Raises SignatureError for what no approved coordinator signed or was changed since, ArtifactError for what is no such file.
    """
    members = _members(path, largest_bytes)
    statement, key = _verified(members[_HEADER], coordinators)
    digests = [{"name": name, "digest": {"sha256": hashlib.sha256(members[name]).hexdigest()}} for name in (FILE, _MOMENTS)]
    if statement.get("predicateType") != PREDICATE or statement.get("subject") != digests:
        raise SignatureError(f"{path.name} was changed since the coordinator signed it, or is no file of candidates. Ask for it again.")
    try:
        header = Header.model_validate_json(json.dumps(statement["predicate"]))
        images, moments = _arrays(members[FILE], largest_bytes), _arrays(members[_MOMENTS], largest_bytes)
        candidates = _candidates(images, data)
        shape = (data.channels, *learnt_shape(data.spatial_shape))
        found = Moments.from_arrays(moments, shape=shape, low_frequencies=header.low_frequencies)
    except (KeyError, ValidationError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ArtifactError(
            f"Expected candidates in {path.name}, found something else ({type(error).__name__}). Ask for it again."
        ) from error
    if images_digest(candidates) != header.images_sha256:
        raise SignatureError(f"The images in {path.name} are not those that its header names. Ask the coordinator.")
    if problem := _layout_problem(candidates, found, data):
        raise UsageError(f"The candidates do not have the layout of this site's data: {problem}.")
    signed = hashlib.sha256(json_bytes(statement)).hexdigest()
    return Carried(header=header, candidates=candidates, moments=found, key=key, statement_sha256=signed)


def _members(path: Path, largest_bytes: int) -> dict[str, bytes]:
    """The three members, none larger than it may be."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            if sorted(sizes) != sorted((_HEADER, FILE, _MOMENTS)) or len(archive.infolist()) != len(sizes):
                raise ArtifactError(f"Expected candidates in {path.name}, found other files. Name what the coordinator sent.")
            if sum(sizes.values()) > largest_bytes or sizes[_HEADER] > _LARGEST_HEADER_BYTES:
                raise ArtifactError(f"{path.name} is larger than the policy's largest_message_bytes allow.")
            return {name: archive.read(name) for name in sizes}
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ArtifactError(f"Expected a readable file of candidates at {path.name} ({type(error).__name__}).") from error


def _verified(content: bytes, coordinators: Sequence[Ed25519PublicKey]) -> tuple[dict[str, Any], str]:
    try:
        envelope = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError("The header of the candidates is no JSON. Ask the coordinator for the file again.") from error
    for public in coordinators:
        try:
            return verify_envelope(envelope, public), key_id(public)
        except SignatureError:
            continue
    raise SignatureError("No coordinator that the policy approves signed these candidates. Ask where the file came from.")


def _arrays(content: bytes, largest_bytes: int) -> dict[str, NDArray[Any]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > largest_bytes:
            raise ValueError("larger than allowed when unpacked")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _candidates(arrays: dict[str, NDArray[Any]], data: DataConfig) -> Candidates:
    attributes = {name: arrays[_ATTRIBUTE + name] for name, _ in data.cells.attributes}
    known = {"images", "labels", "seeds", *(_ATTRIBUTE + name for name in attributes)}
    if set(arrays) != known:
        raise ValueError("other arrays")
    return Candidates(images=arrays["images"], labels=arrays["labels"], seeds=arrays["seeds"], attributes=attributes)


def _layout_problem(candidates: Candidates, moments: Moments, data: DataConfig) -> str:
    """Why the arrays cannot be candidates of these data; empty when they can."""
    images, labels, cells = candidates.images, candidates.labels, data.cells
    expected = (data.channels, *data.spatial_shape)
    if images.dtype != np.uint8 or images.shape[1:] != expected or not len(images):
        return f"expected 8-bit images of shape {expected}, found {images.dtype} of {images.shape[1:]}"
    if labels.shape != (len(images),) or labels.dtype.kind != "i" or labels.min() < 0 or labels.max() >= len(cells.classes):
        return "expected one label of the site's classes for each image"
    if candidates.seeds.shape != labels.shape or candidates.seeds.dtype.kind not in "ui":
        return "expected one seed for each image"
    for name, values in cells.attributes:
        given = candidates.attributes[name]
        if given.shape != (len(images),) or not set(given.tolist()) <= set(values):
            return f"expected for each image one of the site's values of {name}"
    if moments.low_frequencies > min(moments.shape[1:]):
        return "its moments have more low frequencies than the images"
    arrays = moments.to_arrays()
    low, pixels = len(frequencies(moments.shape, moments.low_frequencies).low), int(np.prod(moments.shape))
    shapes = {"counts": (len(cells),), "mean": (len(cells), low), "covariance": (len(cells), low, low), "variance": (len(cells), pixels)}
    if any(arrays[name].shape != shape or not np.isfinite(arrays[name]).all() for name, shape in shapes.items()):
        return "the released moments that go with them have another shape, or are not finite"
    return ""


def _npz(arrays: dict[str, NDArray[Any]]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _zip(members: dict[str, bytes]) -> bytes:
    """Equal members give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), content)
    return buffer.getvalue()
