"""Distance of two Gaussians, fitted to features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def frechet_distance(first: Array, second: Array) -> float:
    """Squared Frechet distance of the Gaussians fitted to (n, d) and (m, d) (Dowson and Landau 1982; Heusel et al. 2017).

    The trace of (A B)^(1/2) is that of (A^(1/2) B A^(1/2))^(1/2): symmetric, so eigenvalues are real whatever the rank.
    """
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    middle = root @ b @ root
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh((middle + middle.T) / 2), 0)).sum()
    return float(((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * shared)
