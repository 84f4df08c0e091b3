"""Stage 3: a class-conditional denoiser whose skip connection is the Wiener filter of the moments.

D(x; sigma, c) = W(x; sigma, c) + e(sigma, c) * F(x, (x - W)/sigma; sigma, c) with W the posterior mean and e its rms error, the role that
c_skip and c_out have in Karras et al. 2022 (section 5). F starts at zero, so D starts as the optimal linear denoiser: the floor.
Because the moments enter only through W, a net that was trained with public moments takes private ones (`transplant`).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

from dpsynth.config import packing
from dpsynth.model.moments import Moments
from dpsynth.model.wiener import WienerFilter

_LOG_SIGMA_MEAN, _LOG_SIGMA_STD = -1.0, 1.3  # of training noise levels for images in [-1, 1]
_PUBLIC_VARIANCE = 0.3  # typical variance of a pixel in [-1, 1]


class Denoiser(nn.Module):
    """Image denoiser at any noise level."""

    def __init__(self, moments: Moments, *, channels: tuple[int, ...]) -> None:
        super().__init__()
        dimensions = len(moments.shape) - 1
        self.packing = packing(moments.shape[1:])
        packed = moments.shape[0] * self.packing**dimensions
        grid = self.packing * 2 ** (len(channels) - 1)  # what the net can pack and halve
        self.padding = [end for side in reversed(moments.shape[1:]) for end in (0, -side % grid)]
        self.wiener = WienerFilter(moments)
        self.net = DiffusionModelUNet(
            spatial_dims=dimensions,
            in_channels=2 * packed,
            out_channels=packed,
            num_res_blocks=1,
            channels=channels,
            attention_levels=(*(False for _ in channels[:-1]), True),
            norm_num_groups=min(16, *channels),
            num_head_channels=min(32, channels[-1]),
            num_class_embeds=moments.num_classes,
        )
        for parameter in (*self._output().parameters(), *self._class_embedding().parameters()):
            nn.init.zeros_(parameter)

    def _output(self) -> nn.Module:
        module: nn.Module = self.net.out[-1].conv
        return module

    def _class_embedding(self) -> nn.Module:
        module: nn.Module = self.net.class_embedding
        return module

    def with_net(self, net: nn.Module) -> Denoiser:
        """The same denoiser around another net of the same shape (a copy that is tested)."""
        other = copy.copy(self)
        other._modules = {**self._modules, "net": net}
        return other

    def transplant(self, moments: Moments) -> None:
        """Exchange the moments; the weights stay."""
        self.wiener = WienerFilter(moments)

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """noisy (n, channel, *space), sigma (n,), labels (n,) to the denoised images."""
        linear, error, correction = self._parts(noisy, sigma, labels)
        return linear + _column(error, noisy) * correction

    def row_losses(self, clean: Tensor, labels: Tensor, *, sigma: Tensor, noise: Tensor) -> Tensor:
        """Squared error of each row in units of the linear filter's error, (n,): 1 is what the floor reaches."""
        noisy = clean + _column(sigma, clean) * noise
        linear, error, correction = self._parts(noisy, sigma, labels)
        return ((clean - linear) / _column(error, clean) - correction).square().flatten(1).mean(1)

    def _parts(self, noisy: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            linear, error = self.wiener(noisy, sigma, labels)
            scaled = noisy / _column((sigma.square() + _PUBLIC_VARIANCE).sqrt(), noisy)
            residual = (noisy - linear) / _column(sigma, noisy)
            packed = torch.cat([self._pack(scaled), self._pack(residual)], dim=1)
        correction = depth_to_space(self.net(packed, sigma.log() * 250 + 1000, class_labels=labels), self.packing)
        return linear, error, correction[(..., *(slice(side) for side in noisy.shape[2:]))]

    def _pack(self, images: Tensor) -> Tensor:
        padded = F.pad(images, self.padding, mode="replicate") if any(self.padding) else images
        return space_to_depth(padded, self.packing)

    def set_trainable(self, which: str) -> None:
        """Freeze all weights but those of the set: "all", or "small" = biases, norms, class embedding, output convolution."""
        small = {id(parameter) for parameter in (*self._output().parameters(), *self._class_embedding().parameters())}
        norms = {id(p) for module in self.net.modules() if isinstance(module, nn.GroupNorm | nn.LayerNorm) for p in module.parameters()}
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(which == "all" or name.endswith("bias") or id(parameter) in small | norms)


def noise_levels(normal: Tensor, *, smallest: float) -> Tensor:
    """Training noise levels from standard normal numbers: log-normal (Karras et al. 2022, table 1), none below `smallest`."""
    return (_LOG_SIGMA_MEAN + _LOG_SIGMA_STD * normal).exp().clamp(min=smallest)


def space_to_depth(images: Tensor, factor: int) -> Tensor:
    """(n, c, *space) to (n, c * factor^d, *space/factor): nothing is lost, and the net works on far fewer positions."""
    n, c, *space = images.shape
    split = images.reshape(n, c, *(part for side in space for part in (side // factor, factor)))
    d = len(space)
    order = (0, 1, *(3 + 2 * axis for axis in range(d)), *(2 + 2 * axis for axis in range(d)))
    return split.permute(order).reshape(n, c * factor**d, *(side // factor for side in space)).contiguous()


def depth_to_space(packed: Tensor, factor: int) -> Tensor:
    """Inverse of `space_to_depth`."""
    n, c, *space = packed.shape
    d = len(space)
    split = packed.reshape(n, c // factor**d, *(factor for _ in space), *space)
    order = (0, 1, *(index for axis in range(d) for index in (2 + d + axis, 2 + axis)))
    return split.permute(order).reshape(n, c // factor**d, *(factor * side for side in space)).contiguous()


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1 for _ in like.shape[1:]))
