"""Fine detail more nearly as strong as was released: a denoiser draws the mean of what an image may look like, so its detail is too weak.

Released moments say how strong each ring of frequencies is in each label, and how strong the generator draws it can be counted without a
patient. Each ring goes half of the way there, in logarithms: what a net did not draw cannot be had by making louder what it drew.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpsynth.model.moments import Frequencies, from_frequencies, parts, summaries, to_frequencies

Array = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

_PART = 1 / 2  # of the way to the released energy
_LARGEST_RATIO = 9.0  # of energies: a ring that the generator leaves empty is not made of rounding errors
_SMALLEST = 1e-12  # energy: a ring without coefficients has the gain 1


def ring_gains(images: Float32, labels: Int64, wanted: Array, layout: Frequencies) -> Array:
    """By what to multiply the coefficients of each ring, (labels, bands).

    images: (n, channel, *space), drawn for labels (n,), each of which occurs; wanted: (n, bands), the released `ring_energies` of images
    like these.
    """
    drawn = summaries(images, layout)[1]
    of_label = [labels == label for label in range(labels.max() + 1)]
    released, counted = (np.stack([energies[rows].mean(axis=0) for rows in of_label]) + _SMALLEST for energies in (wanted, drawn))
    return np.asarray(np.clip(released / counted, 1 / _LARGEST_RATIO, _LARGEST_RATIO) ** (_PART / 2))


def with_gains(images: Float32, gains: Array, layout: Frequencies) -> Float32:
    """Images (n, channel, *space) whose rings are multiplied by gains (n, bands), clipped to [-1, 1]; the low block stays."""
    gains = np.concatenate([gains, np.ones((len(gains), 1))], axis=1)  # -1, the low block, is the last column
    found = np.empty_like(images)
    for part in parts(images):
        coefficients = to_frequencies(images[part]) * gains[part][:, layout.band]
        found[part] = np.clip(from_frequencies(coefficients, images.shape[1:]), -1, 1)
    return found
