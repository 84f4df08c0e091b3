"""Images at half their size or less: each pixel the mean over the 2^d pixels that it stands for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpsynth.data.cohort import Float32, ImageSet


def halved(images: Float32, times: int = 1) -> Float32:
    """Images (n, channel, *space), whose sides are multiples of 2^times, to (n, channel, *space / 2^times). An image's result depends on
    that image alone."""
    for _ in range(times):
        for axis in range(2, images.ndim):
            even, odd = (np.take(images, np.arange(first, images.shape[axis], 2), axis=axis) for first in (0, 1))
            images = (even + odd) / np.float32(2)
    return images


def halved_set(images: ImageSet, times: int) -> ImageSet:
    """The same patients with coarser images."""
    return images if times == 0 else replace(images, images=halved(images.images, times))
