"""Evidence made of points or small images, for tests of the checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dpsynth.checks.accounting import ALWAYS, REQUIRED
from dpsynth.checks.evidence import Evidence, Features
from dpsynth.checks.search import Approaches, Nearest
from dpsynth.checks.statistics import pairwise
from dpsynth.data.cohort import ImageSet


def image_set(
    images: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray | None = None,
    classes: int = 2,
    prefix: str = "p",
    attributes: tuple[Mapping[str, str], ...] | None = None,
) -> ImageSet:
    owners = np.arange(len(images)) if patients is None else patients
    return ImageSet(
        images=images.astype(np.float32),
        labels=labels.astype(np.int64),
        patients=owners.astype(np.int64),
        patient_ids=tuple(f"{prefix}{number}" for number in range(int(owners.max()) + 1)),
        classes=tuple(f"c{number}" for number in range(classes)),
        attributes=attributes or ({},) * len(images),
    )


def blank(patients: int, prefix: str = "p") -> ImageSet:
    return image_set(np.zeros((patients, 1, 4, 4)), np.arange(patients) % 2, prefix=prefix)


def evidence_of(
    training: ImageSet | None = None,
    control: ImageSet | None = None,
    synthetic: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    in_pool: np.ndarray | None = None,
    canaries: Mapping[str, Any] | None = None,
    uses_sgd: bool = True,
    epsilon: float = 8.0,
) -> Evidence:
    training = training or blank(10)
    synthetic = np.zeros((1, 1, 4, 4)) if synthetic is None else synthetic
    return Evidence(
        synthetic=synthetic.astype(np.float32),
        synthetic_labels=(np.zeros(len(synthetic)) if labels is None else labels).astype(np.int64),
        training=training,
        control=control or blank(10, "c"),
        in_pool=np.ones(training.num_patients, dtype=bool) if in_pool is None else in_pool,
        epsilon=epsilon,
        delta=1e-5,
        selfcheck={name: {"ok": True, "detail": ""} for name in (*ALWAYS, *REQUIRED)},
        canaries=canaries or {},
        accounting_problems=(),
        ledger_problems=(),
        uses_sgd=uses_sgd,
    )


def approaches_of(queries: np.ndarray, real: np.ndarray, *, own: np.ndarray | None = None) -> Approaches:
    """Of points, every row of `real` being a patient."""
    distances = pairwise(queries, real)
    if own is not None:
        distances[np.arange(len(queries)), own] = np.inf
    return Approaches.among(Nearest(patient=distances.argmin(axis=1), distances=np.sort(distances, axis=1)[:, :3]), np.arange(len(queries)))


def features_of(synthetic: np.ndarray, training: np.ndarray, control: np.ndarray, in_pool: np.ndarray | None = None) -> Features:
    """Points stand for encoder features and thumbnails alike."""
    real = np.concatenate([training, control])
    inside = np.ones(len(training), dtype=bool) if in_pool is None else in_pool
    pool = np.flatnonzero(np.concatenate([inside, np.ones(len(control), dtype=bool)]))
    return Features(
        synthetic=synthetic,
        training=training,
        control=control,
        synthetic_thumbnails=synthetic,
        training_thumbnails=training,
        control_thumbnails=control,
        synthetic_approaches=approaches_of(synthetic, real),
        real_approaches=approaches_of(real[pool], real, own=pool),
        encoder="points",
    )
