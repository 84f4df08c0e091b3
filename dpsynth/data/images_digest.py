"""Which synthetic images: one digest of candidates before they are released and of the archive that they are released as.

A site that approves candidates signs this digest, and whoever has the released folder computes it again. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsynth.data.candidates import Candidates
from dpsynth.data.medmnist import stored_layout
from dpsynth.errors import ArtifactError

_TRAIN, _NO_ATTRIBUTES = "train_", ("train_images", "train_labels")


def images_digest(candidates: Candidates) -> str:
    """SHA-256 over images, labels and attributes in their order. Seeds are not released and not part of it."""
    return _digest(stored_layout(candidates.images), candidates.labels, candidates.attributes)


def archive_digest(path: Path) -> str:
    """The same of a released archive. Raises ArtifactError when it cannot be read."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            own = [name for name in archive.files if name.startswith(_TRAIN) and name not in _NO_ATTRIBUTES]
            values = {name.removeprefix(_TRAIN): archive[name] for name in own}
            return _digest(archive["train_images"], archive["train_labels"], values)
    except Exception as error:  # zipfile, its decompressors and numpy raise many kinds for broken files
        raise ArtifactError(
            f"Expected an archive of images in {path.name}, found something unreadable ({type(error).__name__})."
        ) from error


def _digest(images: NDArray[np.uint8], labels: NDArray[Any], attributes: Mapping[str, NDArray[Any]]) -> str:
    head = {
        "dtype": images.dtype.str,
        "shape": list(images.shape),
        "labels": [int(label) for label in labels.reshape(-1)],
        "attributes": {name: [str(value) for value in values] for name, values in attributes.items()},
    }
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode() + b"\0")
    digest.update(np.ascontiguousarray(images).tobytes())
    return digest.hexdigest()
