"""Candidates: synthetic 8-bit images that the gate has not judged. Torch-free, so that report and release can read them."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsynth.artifacts import RunFolder, sha256_file, write_bytes
from dpsynth.errors import ArtifactError

FILE = "candidates.npz"


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """images: (n, channel, *space) uint8; labels, seeds: (n,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    seeds: NDArray[np.uint64]


def to_8_bit(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Map [-1, 1] to 0..255, rounding to nearest."""
    return np.asarray(np.rint(np.clip(images, -1, 1) * 127.5 + 127.5), dtype=np.uint8)


def to_unit_range(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Inverse of `to_8_bit` up to rounding."""
    return np.asarray(images.astype(np.float32) / 127.5 - 1, dtype=np.float32)


def load_candidates(run: RunFolder) -> Candidates:
    """Read the candidates of a run. Raises ArtifactError when they were not drawn or were changed."""
    run.require("generate")
    try:
        with np.load(run.folder("generate") / FILE, allow_pickle=False) as arrays:
            return Candidates(images=arrays["images"], labels=arrays["labels"], seeds=arrays["seeds"])
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"Expected readable candidates in {FILE}: {error}. Run `dpsynth generate` again.") from error


def save_candidates(run: RunFolder, candidates: Candidates) -> None:
    """Write the candidates into the run; equal candidates give equal bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=candidates.images, labels=candidates.labels, seeds=candidates.seeds)
    write_bytes(run.folder("generate") / FILE, buffer.getvalue())


def candidates_digest(run: RunFolder) -> str:
    """SHA-256 of the file of candidates: what was checked must be what is released."""
    return sha256_file(run.folder("generate") / FILE)
