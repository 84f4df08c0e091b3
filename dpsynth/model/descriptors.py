"""Few numbers that tell what an image looks like and where: how strong each frequency is, where detail lies, where it is light and dark.

No weights are learnt, so they need no public data of the right kind. What is rare to see in the pixels of one image, and what many
classifiers rest on, is plain in them: logarithms of energy change little with contrast and much with texture. The checks compare images
by them too, because KID on ImageNet features rewards blur: log-energies fall without bound when detail is smoothed away, and rise only
a little under the noise that a sampler leaves.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dctn
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

Array = NDArray[np.float64]
Float32 = NDArray[np.float32]

_BLOCK = 512  # images at once
NUM_RINGS = 12
_PLACES = {2: (4, 7), 3: (3, 5)}  # by dimensions: blocks an axis, pixels of the thumbnail an axis
_FLOOR = 4e-4  # energy of a coefficient at noise of 0.02, below what 8 bits and JPEG leave: no band is better known than this


def descriptors(images: Float32) -> Array:
    """(n, 93) of images (n, channel, height, width) in [-1, 1], (n, 191) of volumes, each of their channels' mean.

    Log-energies of 12 rings of the cosine transform; log-energies of Haar detail at two scales in 4 blocks an axis (volumes: 3), which
    places the detail; and a thumbnail of 7 pixels an axis (volumes: 5), which places light and shade. Numbers of natural size, so that
    none of the three parts drowns the others.
    """
    return np.concatenate([_of_block(images[start : start + _BLOCK]) for start in range(0, len(images), _BLOCK)])


def _of_block(images: Float32) -> Array:
    grey = images.mean(axis=1, dtype=np.float64)
    blocks, thumbnail = _PLACES[grey.ndim - 1]
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
    ring = np.minimum((radius * NUM_RINGS).astype(int), NUM_RINGS - 1)
    return np.stack([coefficients[:, ring == band].sum(axis=1) / max((ring == band).sum(), 1) for band in range(NUM_RINGS)], axis=1)


def _haar(images: Array) -> tuple[Array, Array]:
    """Means and mean detail energy of cells of 2 an axis: (n, *sides) to two of (n, *sides/2). The last of an odd side is left out."""
    n, *sides = images.shape
    images = images[(slice(None), *(slice(max(side // 2 * 2, 1)) for side in sides))]
    cells = images.reshape(n, *(part for side in images.shape[1:] for part in (max(side // 2, 1), min(side, 2))))
    within = tuple(2 + 2 * axis for axis in range(len(sides)))
    return cells.mean(axis=within), cells.var(axis=within)


def _pooled(images: Array, side: int) -> Array:
    pool = adaptive_avg_pool2d if images.ndim == 3 else adaptive_avg_pool3d
    return np.asarray(pool(torch.from_numpy(np.ascontiguousarray(images))[:, None], side).flatten(1).numpy())
