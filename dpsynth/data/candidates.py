"""Candidates: synthetic 8-bit images that the gate has not judged. Torch-free, so that report and release can read them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from dpsynth.artifacts import RunFolder, read_json, write_bytes, write_json
from dpsynth.errors import ArtifactError

WITHHELD = "withheld"  # public fact of the stage
FILE, CELLS = "candidates.npz", "cells.json"
_ATTRIBUTE = "attribute_"  # begins the name of an attribute's array


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """images: (n, channel, *space) uint8; labels, seeds: (n,); attributes: by name the value of each image, (n,).

    sha256: of the bytes that these were read from, so that what is judged and what is named are one; empty when they were not read.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    seeds: NDArray[np.uint64]
    attributes: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)
    sha256: str = ""

    def kept(self, rows: NDArray[np.bool_]) -> Candidates:
        """Those of the rows (n,) that are true."""
        attributes = {name: values[rows] for name, values in self.attributes.items()}
        return Candidates(images=self.images[rows], labels=self.labels[rows], seeds=self.seeds[rows], attributes=attributes)

    def conditions(self) -> list[dict[str, str]]:
        """The attributes of each image."""
        return [{name: str(values[row]) for name, values in self.attributes.items()} for row in range(len(self.images))]


@dataclass(frozen=True, kw_only=True)
class CellRow:
    """A cell in a report: patients as released with noise of `stddev`, and images drawn. All of it may leave."""

    name: str
    noisy_patients: float
    stddev: float
    images: int


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
        content = (run.folder("generate") / FILE).read_bytes()
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            attributes = {name.removeprefix(_ATTRIBUTE): arrays[name] for name in arrays.files if name.startswith(_ATTRIBUTE)}
            return Candidates(
                images=arrays["images"], labels=arrays["labels"], seeds=arrays["seeds"], attributes=attributes,
                sha256=hashlib.sha256(content).hexdigest(),
            )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"Expected readable candidates in {FILE}: {error}. Run `dpsynth generate` again.") from error


def withheld(run: RunFolder) -> int:
    """How many drawn images were left out of the candidates on grounds that read no private image."""
    return int(run.require("generate").facts.get(WITHHELD, 0))


def save_candidates(run: RunFolder, candidates: Candidates) -> None:
    """Write the candidates into the run; equal candidates give equal bytes."""
    buffer = io.BytesIO()
    arrays: dict[str, NDArray[np.generic]] = {"images": candidates.images, "labels": candidates.labels, "seeds": candidates.seeds}
    arrays |= {_ATTRIBUTE + name: values for name, values in candidates.attributes.items()}
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(run.folder("generate") / FILE, buffer.getvalue())


def save_cell_rows(run: RunFolder, rows: tuple[CellRow, ...]) -> None:
    """Write how the cells were drawn."""
    write_json(run.folder("generate") / CELLS, [asdict(row) for row in rows])


def load_cell_rows(run: RunFolder) -> tuple[CellRow, ...]:
    """How the cells were drawn; empty when the generator has no attributes. Raises ArtifactError."""
    path = run.folder("generate") / CELLS
    if not path.is_file():
        return ()
    try:
        return tuple(CellRow(**row) for row in read_json(path))
    except TypeError as error:
        raise ArtifactError(f"Expected rows of cells in {CELLS}. Run `dpsynth generate` again.") from error
