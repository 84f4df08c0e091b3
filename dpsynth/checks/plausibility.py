"""Is an image one that the released moments could have led to? They are what differential privacy let out, so asking costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsynth.data.cohort import Float32, Int64
from dpsynth.data.halve import halved
from dpsynth.model.moments import Moments, frequencies, to_frequencies

Array = NDArray[np.float64]
_BLOCK = 512
_DAMPING = 0.1  # of the mean variance
_FAINTEST = 1e-3  # mean square of a pixel: what a generator may add of its own above a detail that the moments call empty


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Released moments by cell. mean: (cells, low); whitening: (cells, low, low), so that the squared norm of a whitened distance from
    the mean is 1 on average; detail: (cells,), energy above the low block."""

    shape: tuple[int, ...]
    low_frequencies: int
    mean: Array
    whitening: Array
    detail: Array

    @classmethod
    def of(cls, moments: Moments) -> Reference:
        """The reference of a generator's moments."""
        return cls(
            shape=moments.shape,
            low_frequencies=moments.low_frequencies,
            mean=moments.mean,
            whitening=np.stack([_whitening(covariance) for covariance in moments.covariance]),
            detail=moments.variance.sum(axis=1),
        )


def _whitening(covariance: Array) -> Array:
    """(low, low): divides by the spread along each axis, of which every one is given `_DAMPING` of the mean variance more, since the
    weakest released variances are mostly noise."""
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, 0)
    damped = values + max(_DAMPING * float(values.mean()), _FAINTEST)
    return np.asarray(vectors / np.sqrt(damped * max(float((values / damped).sum()), 1e-9)))


def deviations(images: Float32, cells: Int64, reference: Reference) -> tuple[Array, Array]:
    """(structure, detail), (n,) each, of images (n, channel, *space) in [-1, 1] drawn from `cells`: 1 is usual. Images that were enlarged
    after they were drawn are brought back to the size of the moments.

    structure: squared Mahalanobis distance from the cell's mean in the low block, weak directions damped, as part of its mean.
    detail: energy above the low block as part of what the cell has, or of the smallest that could be seen.
    """
    layout = frequencies(reference.shape, reference.low_frequencies)
    pixels, enlargements = layout.band.size, (images.shape[2] // reference.shape[1]).bit_length() - 1
    above = np.setdiff1d(np.arange(pixels), layout.low)
    structure, detail = np.empty(len(images)), np.empty(len(images))
    for start in range(0, len(images), _BLOCK):
        rows = slice(start, start + _BLOCK)
        coefficients, cell = to_frequencies(halved(images[rows], enlargements)), cells[rows]
        away = coefficients[:, layout.low] - reference.mean[cell]
        for number in np.unique(cell):
            inside = cell == number
            structure[rows][inside] = ((away[inside] @ reference.whitening[number]) ** 2).sum(axis=1)
        detail[rows] = (coefficients[:, above] ** 2).sum(axis=1) / np.maximum(reference.detail[cell], _FAINTEST * pixels)
    return structure, detail
