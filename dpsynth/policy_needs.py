"""What the gate's policy needs on this machine: its encoder, by path and hash, and the reader of burned-in text. Torch-free.

It is asked before anything is charged, since a policy that lacks something allows no release, and by the checks themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsynth.config import EncoderConfig, GateConfig
from dpsynth.errors import ArtifactError, DpsynthError, UsageError

Float32 = NDArray[np.float32]


def require_present(gate: GateConfig) -> None:
    """Raise ArtifactError or UsageError, with the path, unless one grey picture goes through the encoder and the reader is installed."""
    if gate.encoder is not None:
        _try(gate.encoder)
    if gate.content.text == "ocr" and find_spec("rapidocr") is None:
        raise UsageError("gate.content.text: ocr needs RapidOCR, which is not installed. Run: pip install 'dpsynth[ocr]', or set strokes.")


def missing(gate: GateConfig) -> str:
    """What `require_present` would raise, in one line; empty when nothing is missing."""
    try:
        require_present(gate)
    except DpsynthError as error:
        return str(error)
    return ""


def _try(config: EncoderConfig) -> None:
    mean, stddev = (np.array(values, dtype=np.float32).reshape(1, 3, 1, 1) for values in (config.mean, config.stddev))
    picture = np.full((1, 3, config.side, config.side), 0.5, dtype=np.float32)
    try:
        network(config, threads=1)((picture - mean) / stddev)
    except DpsynthError as error:
        raise type(error)(f"gate.encoder.path {config.path}: {error}") from error


def content(path: Path, sha256: str, *, remedy: str) -> bytes:
    """The bytes of a file of this hash. Raises ArtifactError."""
    found = path.read_bytes() if path.is_file() else None
    digest = "no file" if found is None else hashlib.sha256(found).hexdigest()
    if found is None or digest != sha256:
        raise ArtifactError(f"Expected the declared encoder with SHA-256 {sha256[:12]}, found {digest[:12]}. {remedy}")
    return found


def network(config: EncoderConfig, *, threads: int) -> Callable[[Float32], Float32]:
    """From scaled pictures (n, 3, side, side) to finite rows (n, features). Raises ArtifactError, UsageError without ONNX Runtime.

    ONNX holds a graph and numbers, so reading it runs nothing of whoever wrote it (as a pickled network would). What is read is what was
    hashed: weights in other files beside it, which no hash covers, are not looked for.
    """
    stored = content(config.path, config.sha256, remedy="Name the file that was declared, or declare this one in the policy.")
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UsageError("gate.encoder needs ONNX Runtime, which is not installed. Run: pip install 'dpsynth[encoder]'.") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(config.path / "nowhere"))
    try:
        session = onnxruntime.InferenceSession(stored, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise ArtifactError(
            f"Expected {config.path.name} to be an ONNX network in one file, and it cannot be read. Export it again."
        ) from error
    if len(session.get_inputs()) != 1:
        raise ArtifactError(f"Expected {config.path.name} to have one input of pictures, found {len(session.get_inputs())}.")
    source = session.get_inputs()[0].name

    def rows(pictures: Float32) -> Float32:
        try:
            found: NDArray[Any] = np.asarray(session.run(None, {source: np.ascontiguousarray(pictures)})[0], dtype=np.float32)
        except Exception as error:
            shape = "x".join(map(str, pictures.shape[1:]))
            raise ArtifactError(f"Expected {config.path.name} to take pictures of {shape}, and it does not: {_short(error)}") from error
        found = found.mean(axis=(2, 3)) if found.ndim == 4 else found
        if found.ndim != 2 or len(found) != len(pictures) or not np.isfinite(found).all():
            raise ArtifactError(f"Expected {config.path.name} to give finite rows of features, found shape {found.shape}.")
        return found

    return rows


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
