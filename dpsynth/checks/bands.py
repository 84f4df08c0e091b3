"""What images are compared by beside the encoder: energies of frequency bands and their places, without weights.

It exists because KID on ImageNet features rewards blur: log-energies of frequency bands fall without bound when detail is smoothed away,
and rise only a little under the noise that a sampler leaves.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dctn
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

from dpsynth.data.cohort import Float32

Array = NDArray[np.float64]
NUM_BANDS = 12
_PLACES = {2: (4, 7), 3: (3, 5)}  # by dimensions: blocks an axis, pixels of the thumbnail an axis
_FLOOR = 4e-4  # energy of a coefficient at noise of 0.02, below what 8 bits and JPEG leave: no band is better known than this


def band_features(images: Float32) -> Array:
    """Second extractor beside the encoder, (n, 93) of images (n, channel, height, width) in [-1, 1], (n, 203) of volumes; no weights.

    Log-energies of 12 rings of the cosine transform; log-energies of Haar detail at two scales in 4 blocks an axis (volumes: 3), which
    places the detail; and a thumbnail of 7 pixels an axis (volumes: 5), which places light and shade. Numbers of natural size, so that
    none of the three parts drowns the others.
    """
    grey = images.mean(axis=1, dtype=np.float64)
    axes = tuple(range(1, grey.ndim))
    blocks, thumbnail = _PLACES[len(axes)]
    parts, coarse = [np.log(_rings(grey) + _FLOOR) / 2], grey
    for _ in range(2):
        coarse, detail = _haar(coarse)
        parts.append(np.log(_pooled(detail, blocks) + _FLOOR) / 2)
    return np.concatenate([*parts, _pooled(grey, thumbnail)], axis=1)


def log_spectrum(images: Float32) -> Array:
    """Log-energies of 12 rings of the cosine transform, natural logarithm, (n, 12) of images (n, channel, *space) in [-1, 1]."""
    return np.asarray(np.log(_rings(images.mean(axis=1, dtype=np.float64)) + _FLOOR))


def _rings(grey: Array) -> Array:
    coefficients = dctn(grey, axes=tuple(range(1, grey.ndim)), norm="ortho") ** 2
    radius = np.sqrt(sum(grid**2 for grid in np.meshgrid(*(np.arange(side) / side for side in grey.shape[1:]), indexing="ij")))
    ring = np.minimum((radius * NUM_BANDS).astype(int), NUM_BANDS - 1)
    return np.stack([coefficients[:, ring == band].mean(axis=1) for band in range(NUM_BANDS)], axis=1)


def _haar(images: Array) -> tuple[Array, Array]:
    """Means and mean detail energy of cells of 2 an axis: (n, *sides) to two of (n, *sides/2)."""
    n, *sides = images.shape
    cells = images.reshape(n, *(part for side in sides for part in (side // 2, 2)))
    within = tuple(2 + 2 * axis for axis in range(len(sides)))
    return cells.mean(axis=within), cells.var(axis=within)


def _pooled(images: Array, side: int) -> Array:
    pool = adaptive_avg_pool2d if images.ndim == 3 else adaptive_avg_pool3d
    return np.asarray(pool(torch.from_numpy(images)[:, None], side).flatten(1).numpy())
