"""All that a check may see, with features computed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsynth.checks.features import encode, mirrored
from dpsynth.checks.screening import Screening
from dpsynth.data.cohort import Float32, ImageSet, Int64
from dpsynth.model.thumbnails import thumbnails
from dpsynth.progress import Progress

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Images and what the trainer proved. synthetic: (n, channel, *space) in [-1, 1]."""

    synthetic: Float32
    synthetic_labels: Int64
    training: ImageSet
    control: ImageSet
    selfcheck: Mapping[str, Any]
    accounting_problems: tuple[str, ...]
    ledger_problems: tuple[str, ...]
    uses_sgd: bool
    screening: Screening | None = None  # of the synthetic images, on grounds that read no private image
    synthetic_attributes: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)  # by declared attribute, (n,)
    withheld: int = 0  # synthetic images that the screening left out when they were drawn


@dataclass(frozen=True, kw_only=True)
class Features:
    """Encoder features, of one image a patient since tests count patients; thumbnails of all images, the synthetic ones also mirrored."""

    synthetic: Array
    training: Array
    control: Array
    synthetic_thumbnails: Array
    mirrored_thumbnails: Array
    training_thumbnails: Array
    control_thumbnails: Array


def compute_features(evidence: Evidence, *, progress: Progress) -> Features:
    """Features of the evidence."""
    return Features(
        synthetic=encode(evidence.synthetic, task="synthetic images", progress=progress),
        training=encode(first_images(evidence.training), task="training images", progress=progress),
        control=encode(first_images(evidence.control), task="control images", progress=progress),
        synthetic_thumbnails=thumbnails(evidence.synthetic),
        mirrored_thumbnails=thumbnails(mirrored(evidence.synthetic)),
        training_thumbnails=thumbnails(evidence.training.images),
        control_thumbnails=thumbnails(evidence.control.images),
    )


def first_images(images: ImageSet) -> Float32:
    """One image per patient: images of one patient are not independent."""
    return images.images[[int(rows[0]) for rows in images.rows_of()]]
