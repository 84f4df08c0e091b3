"""Sums over patients with booked noise: the one place where a stage that is no DP-SGD touches private images.

A patient's contribution to a query is the mean over their images of class-indexed vectors that were clipped to the query's clip
norm, so by convexity it is never longer than the clip norm, whatever and however many the images are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from dpsynth.privacy.mechanism import MomentRelease
from dpsynth.privacy.noise import NoiseStream

Array = NDArray[np.float64]
Int64 = NDArray[np.int64]
Record = Callable[[str, Array, Array], None]

_AT_ONCE = 128  # rows: a federation's coordinator says how wide they are, and memory must not tell how many there are


@dataclass(frozen=True, kw_only=True)
class NoisedSums:
    """Answers the queries of `mechanism` on rows of images with `labels` (n,) of `patients` (n,); without a mechanism there is no noise.

    `record` is told each query's name, its exact sums and its noised sums, (classes, width) each, so that a monitor can compare.
    """

    labels: Int64
    patients: Int64
    num_classes: int
    mechanism: MomentRelease | None
    stream: NoiseStream | None
    record: Record | None = None

    def __post_init__(self) -> None:
        if (self.mechanism is None) != (self.stream is None):
            raise ValueError("Expected a mechanism and a noise stream, or neither.")

    def noised_sum(self, name: str, rows: Callable[[slice], Array], clip_norm: float) -> Array:
        """Sum over patients of the mean over their rows of class-indexed, clipped vectors: (classes, width). rows: as for `patient_sum`."""
        if self.mechanism is not None and clip_norm != self.mechanism.query(name).clip_norm:
            raise ValueError(f"The clip norm of query {name!r} is not the booked one.")
        total = patient_sum(rows, self.labels, self.patients, self.num_classes, clip_norm)
        noised = np.asarray(total + self.noise_stddev(name) * self._normal(name, total.size).reshape(total.shape))
        if self.record is not None:
            self.record(name, total, noised)
        return noised

    def noise_stddev(self, name: str) -> float:
        """Standard deviation of the noise on each number of a query."""
        return 0.0 if self.mechanism is None else self.mechanism.noise_stddev(name)

    def _normal(self, name: str, size: int) -> Array:
        return np.zeros(size) if self.stream is None else self.stream.normal(f"moments/{name}", 0, size)


def patient_sum(rows: Callable[[slice], Array], labels: Int64, patients: Int64, num_classes: int, clip_norm: float) -> Array:
    """(classes, width): each patient adds a vector of norm at most `clip_norm`. Rows that are not finite count as zero.

    rows: those of a part of the images, (images, width); a few are asked for at a time.
    """
    weights = 1 / np.bincount(patients)[patients]
    parts = [slice(start, start + _AT_ONCE) for start in range(0, max(len(labels), 1), _AT_ONCE)]
    return reduce(np.add, (_class_sums(rows(part), labels[part], weights[part], num_classes, clip_norm) for part in parts))


def _class_sums(rows: Array, labels: Int64, weights: Array, num_classes: int, clip_norm: float) -> Array:
    rows = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0.0)
    weighted = clipped(rows, clip_norm) * weights[:, None]
    return np.stack([weighted[labels == label].sum(axis=0) for label in range(num_classes)])


def clipped(rows: Array, norm: float) -> Array:
    """Rows (n, width) cut down to length `norm`."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows * np.minimum(1.0, norm / np.maximum(norms, 1e-12)))
