"""Small normalised copies of images, for comparing them by what is seen at a glance."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_SIDE, _SIDE_OF_VOLUMES = 14, 8


def thumbnails(images: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rows (n, pixels) of mean 0 and norm 1 of images (n, channel, *space) in [-1, 1], averaged down to at most 14 per axis (8 in volumes).

    This forgives small shifts. Values that are not finite count as 0.
    """
    tensor = torch.from_numpy(np.nan_to_num(images, nan=0.0, posinf=1.0, neginf=-1.0)).mean(1, keepdim=True)
    rows = averaged_down(tensor).flatten(1).double().numpy()
    rows = rows - rows.mean(axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9))


def averaged_down(images: Tensor) -> Tensor:
    """Images (n, channel, *space) with at most 14 pixels per axis (8 in volumes)."""
    space = images.shape[2:]
    target = [min(extent, _SIDE if len(space) == 2 else _SIDE_OF_VOLUMES) for extent in space]
    return F.adaptive_avg_pool2d(images, target) if len(space) == 2 else F.adaptive_avg_pool3d(images, target)  # type: ignore[arg-type]
