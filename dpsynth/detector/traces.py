"""What drawing leaves in an image: how energy falls with frequency, how fine detail is distributed, correlated and tied to brightness.

No trace says what is shown or how bright it is: a detector of places, contrasts or organs would tell hospitals apart, not images that were
drawn from images that were taken. Numbers are logarithms or correlations, so that no single one grows without bound.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn

Array = NDArray[np.float64]
_BLOCK = 256
SMALLEST_SIDE = 5
_RINGS, _SCALES = 12, 3
_LEVEL = 1 / 255  # one grey level, below which nothing is known
_FLOOR = _LEVEL**2 / 12  # energy of rounding


def traces(images: NDArray[np.uint8]) -> Array:
    """(n, traces) of 8-bit images (n, channel, *space), two or three spatial axes of at least 5 pixels; equal images give equal numbers."""
    blocks = [_of_block(images[start : start + _BLOCK]) for start in range(0, len(images), _BLOCK)]
    return np.concatenate(blocks)


def _of_block(images: NDArray[np.uint8]) -> Array:
    grey = images.mean(axis=1, dtype=np.float64) / 255
    parts, coarse = [_spectrum(grey), _ends(grey), _noise_by_brightness(grey)], grey
    for _ in range(_SCALES):
        if min(coarse.shape[1:]) < SMALLEST_SIDE:
            break
        parts.append(_detail(coarse))
        coarse = _halved(coarse)
    return np.concatenate(parts, axis=1)


def _spectrum(grey: Array) -> Array:
    """Log-energies of 12 rings of the cosine transform less their mean: the shape of the spectrum, whatever the contrast."""
    energies = dctn(grey, axes=tuple(range(1, grey.ndim)), norm="ortho") ** 2
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(*(np.arange(side) / side for side in grey.shape[1:]), indexing="ij")))
    ring = np.minimum((radius * _RINGS).astype(int), _RINGS - 1)
    rings = np.stack([energies[:, ring == band].mean(axis=1) for band in np.unique(ring)], axis=1)
    logs = np.log(rings + _FLOOR)
    return np.asarray(logs - logs.mean(axis=1, keepdims=True))


def _ends(grey: Array) -> Array:
    """Log-shares of pixels at the ends of the grey scale."""
    flat = grey.reshape(len(grey), -1)
    shares = [(flat <= _LEVEL / 2).mean(axis=1), (flat >= 1 - _LEVEL / 2).mean(axis=1)]
    return np.asarray(np.log(np.stack(shares, axis=1) + 1e-3))


def _second_differences(grey: Array) -> list[Array]:
    """Along each axis, on the pixels that have neighbours along all: differences of one shape."""
    inner = (slice(None), *(slice(1, -1) for _ in grey.shape[1:]))
    found = []
    for axis in range(1, grey.ndim):
        before = tuple(slice(0, -2) if place == axis else part for place, part in enumerate(inner))
        after = tuple(slice(2, None) if place == axis else part for place, part in enumerate(inner))
        found.append(grey[before] - 2 * grey[inner] + grey[after])
    return found


def _noise_by_brightness(grey: Array) -> Array:
    """Log-energy of fine detail in the darkest, middle and brightest third of an image's pixels, less that of the whole."""
    fine = np.sum(_second_differences(grey), axis=0).reshape(len(grey), -1) ** 2
    inner = grey[(slice(None), *(slice(1, -1) for _ in grey.shape[1:]))].reshape(len(grey), -1)
    order = np.argsort(inner, axis=1, kind="stable")
    ranked = np.take_along_axis(fine, order, axis=1)
    thirds = np.stack([part.mean(axis=1) for part in np.array_split(ranked, 3, axis=1)], axis=1)
    return np.asarray(np.log(thirds + _FLOOR) - np.log(fine.mean(axis=1, keepdims=True) + _FLOOR))


def _detail(grey: Array) -> Array:
    """Of second differences, means over the axes: log-energy, log-kurtosis, correlation of neighbours, share near zero; and how far
    their sizes along two axes go together, which they do at edges and not in noise."""
    flat, neighbours = [], []
    for difference in _second_differences(grey):
        flat.append(difference.reshape(len(grey), -1))
        first, last = difference[:, :-1].reshape(len(grey), -1), difference[:, 1:].reshape(len(grey), -1)
        neighbours.append(_correlation(first, last))
    energy = np.stack([(rows**2).mean(axis=1) for rows in flat])
    fourth = np.stack([(rows**4).mean(axis=1) for rows in flat])
    typical = np.sqrt(energy)[..., None] / 4
    near_zero = np.stack([(np.abs(rows) < size).mean(axis=1) for rows, size in zip(flat, typical, strict=True)])
    together = _correlation(np.abs(flat[0]), np.abs(flat[1]))
    means = [np.log(energy + _FLOOR), np.log((fourth + _FLOOR**2) / (energy + _FLOOR) ** 2), np.stack(neighbours), near_zero]
    return np.stack([*(part.mean(axis=0) for part in means), together], axis=1)


def _correlation(first: Array, second: Array) -> Array:
    """Of each row, 0 where one side is constant."""
    a, b = (side - side.mean(axis=1, keepdims=True) for side in (first, second))
    return np.asarray((a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1) + 1e-12))


def _halved(grey: Array) -> Array:
    """Means of cells of 2 an axis; the last of an odd side is left out."""
    for axis in range(1, grey.ndim):
        size = grey.shape[axis] // 2 * 2
        rows = np.moveaxis(grey, axis, 0)[:size]
        grey = np.moveaxis((rows[0::2] + rows[1::2]) / 2, 0, axis)
    return grey
