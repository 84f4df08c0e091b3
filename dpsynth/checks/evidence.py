"""All that a check may see, with features computed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsynth.checks.encoders import Encoder
from dpsynth.checks.features import encode, out_of_focus
from dpsynth.checks.kept import Keep, keep_nothing
from dpsynth.checks.screening import Screening
from dpsynth.checks.search import Approaches, approaches
from dpsynth.data.cohort import Float32, ImageSet, Int64
from dpsynth.model.generator import Generator
from dpsynth.model.thumbnails import thumbnails
from dpsynth.progress import Progress

Array = NDArray[np.float64]
Bool = NDArray[np.bool_]
_BLURRED = 200  # enough to tell a share of a half


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Images and what the trainer proved. synthetic: (n, channel, *space) in [-1, 1].

    in_pool: which training patients are in the audit pool (training patients,); all control patients are. epsilon, delta: the claim.
    canaries: outcome of the audits by gradient canaries, as the trainer wrote it; empty without DP-SGD.
    """

    synthetic: Float32
    synthetic_labels: Int64
    training: ImageSet
    control: ImageSet
    in_pool: Bool
    epsilon: float
    delta: float
    selfcheck: Mapping[str, Any]
    canaries: Mapping[str, Any]
    accounting_problems: tuple[str, ...]
    ledger_problems: tuple[str, ...]
    uses_sgd: bool
    screening: Screening | None = None  # of the synthetic images, on grounds that read no private image
    synthetic_attributes: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)  # by declared attribute, (n,)
    generator: Generator | None = None  # with its weights, for the site's own look at them
    withheld: int = 0  # synthetic images that the screening left out when they were drawn

    @property
    def pool(self) -> Int64:
        """Numbers of the pool's patients, training patients first, then control patients counted on from them."""
        return np.flatnonzero(np.concatenate([self.in_pool, np.ones(self.control.num_patients, dtype=bool)])).astype(np.int64)

    @property
    def inside(self) -> Bool:
        """For each patient of the pool whether the coin put them into training."""
        return np.asarray(self.pool < self.training.num_patients)

    @property
    def first_rows(self) -> list[tuple[ImageSet, int]]:
        """Where the first image of each patient is, numbered as in `pool`."""
        return [(images, int(rows[0])) for images in (self.training, self.control) for rows in images.rows_of()]


@dataclass(frozen=True, kw_only=True)
class Features:
    """Encoder features and thumbnails, of one image a patient since tests count patients; and what lies next to what.

    synthetic_approaches: of every synthetic image among all patients (numbered as in `Evidence.pool`). real_approaches: of each
    first image of the pool among all other patients: how near people come to each other by chance. blurred: of images of the first
    training patients out of focus, or None; an encoder that takes them for sharp ones cannot judge fidelity.
    """

    synthetic: Array
    training: Array
    control: Array
    synthetic_thumbnails: Array
    training_thumbnails: Array
    control_thumbnails: Array
    synthetic_approaches: Approaches
    real_approaches: Approaches
    encoder: str  # its name
    blurred: Array | None = None


def compute_features(evidence: Evidence, *, encoder: Encoder, progress: Progress, keep: Keep = keep_nothing) -> Features:
    """Features of the evidence."""
    training, control = first_images(evidence.training), first_images(evidence.control)
    real = np.concatenate([evidence.training.images, evidence.control.images])
    patients = np.concatenate([evidence.training.patients, evidence.control.patients + evidence.training.num_patients])
    firsts = np.concatenate([training, control])[evidence.pool]
    queries = np.concatenate([evidence.synthetic, firsts])  # one search for both: laying down the real images takes longest
    own = np.concatenate([np.full(len(evidence.synthetic), -1, dtype=np.int64), evidence.pool])
    found = approaches(queries, real, patients, own=own, progress=progress, keep=keep)
    del queries, real

    def encoded(images: Float32, task: str) -> Array:
        return keep(f"features of {task}", lambda: {"rows": encode(images, task=task, progress=progress, encoder=encoder)})["rows"]

    return Features(
        synthetic=encoded(evidence.synthetic, "synthetic images"),
        training=encoded(training, "training images"),
        control=encoded(control, "control images"),
        synthetic_thumbnails=thumbnails(evidence.synthetic),
        training_thumbnails=thumbnails(training),
        control_thumbnails=thumbnails(control),
        synthetic_approaches=found.of(0, len(evidence.synthetic)),
        real_approaches=found.of(len(evidence.synthetic), len(evidence.synthetic) + len(firsts)),
        encoder=encoder.name,
        blurred=encoded(out_of_focus(training[:_BLURRED]), "images out of focus"),
    )


def first_images(images: ImageSet) -> Float32:
    """One image per patient: images of one patient are not independent."""
    return images.images[[int(rows[0]) for rows in images.rows_of()]]
