"""Features of images: what an encoder makes of them, mean over slices for volumes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from dpsynth.checks.encoders import Encoder, bundled
from dpsynth.progress import Progress

Array = NDArray[np.float64]
Float32 = NDArray[np.float32]

_BATCH = 16  # larger ones leave the processor's cache and take twice as long


@torch.no_grad()
def encode(images: Float32, *, task: str, progress: Progress, encoder: Encoder | None = None) -> Array:
    """Features (n, features) of images (n, channel, *space) in [-1, 1], by the bundled encoder when none is given; of a volume the mean
    over its three central slices.
    """
    encoder = encoder or bundled()
    slices = _slices(torch.from_numpy(images))
    parts = []
    for start in range(0, len(images), _BATCH):
        features = [encoder.features(_as_picture(part[start : start + _BATCH], encoder.side)) for part in slices]
        parts.append(torch.stack(features).mean(0))
        progress(f"features of {task}", min(start + _BATCH, len(images)), len(images))
    return torch.cat(parts).double().numpy()


def _slices(images: Tensor) -> list[Tensor]:
    if images.dim() == 4:
        return [images]
    return [images.select(axis, images.shape[axis] // 2) for axis in (2, 3, 4)]


def _as_picture(images: Tensor, side: int) -> Tensor:
    grown = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    return (grown.expand(-1, 3, -1, -1) if grown.shape[1] == 1 else grown).contiguous(memory_format=torch.channels_last)


def mirrored(images: Float32) -> Float32:
    """The images flipped left to right (the second spatial axis)."""
    return np.ascontiguousarray(np.flip(images, axis=3))


def out_of_focus(images: Float32) -> Float32:
    """Images (n, channel, *space) blurred by a Gaussian whose standard deviation is a tenth of each side: nothing small is left of them."""
    stddev = (0.0, 0.0, *(side / 10 for side in images.shape[2:]))
    return np.asarray(gaussian_filter(images, stddev, mode="nearest"), dtype=np.float32)
