"""Stage 3: a class-conditional denoiser whose skip connection is the Wiener filter of the moments.

D(x; sigma, c) = W(x; sigma, c) + e(sigma, c) * F(x, (x - W)/sigma; sigma, c) with W the posterior mean and e its rms error, the role that
c_skip and c_out have in Karras et al. 2022 (section 5). F starts at zero, so D starts as the optimal linear denoiser: the floor.
Because the moments enter only through W, a net that was trained with public moments takes private ones (`transplant`).

The net speaks at noise levels up to LARGEST_SIGMA alone; above, D is W. What is large in an image is drawn there, and the released
moments know it: a net from public images draws the classes nearer to each other than they are (experiments/004-public-prior). What an
image holds at one frequency grows with the root of its pixels, so the level is higher for volumes.
"""

from __future__ import annotations

import copy

import torch
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

from dpsynth.config import LARGEST_SIGMA
from dpsynth.model.moments import Moments
from dpsynth.model.packing import Packing
from dpsynth.model.wiener import WienerFilter

_LOG_SIGMA_MEAN, _LOG_SIGMA_STD = -1.0, 1.3  # of training noise levels for images in [-1, 1]
_PUBLIC_VARIANCE = 0.3  # typical variance of a pixel in [-1, 1]


class Denoiser(nn.Module):
    """Image denoiser at any noise level."""

    def __init__(self, moments: Moments, *, channels: tuple[int, ...]) -> None:
        super().__init__()
        dimensions = len(moments.shape) - 1
        self.packing = Packing(moments.shape[1:], levels=len(channels))
        packed = self.packing.channels(moments.shape[0])
        self.largest_sigma = LARGEST_SIGMA[dimensions]
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
        return linear + _column(error * (sigma <= self.largest_sigma), noisy) * correction

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
            packed = torch.cat([self.packing.pack(scaled), self.packing.pack(residual)], dim=1)
        correction = self.net(packed, sigma.log() * 250 + 1000, class_labels=labels)
        return linear, error, self.packing.unpack(correction)

    def set_trainable(self, which: str) -> None:
        """Freeze all weights but those of the set: "all", or "small" = biases, norms, class embedding, output convolution."""
        small = {id(parameter) for parameter in (*self._output().parameters(), *self._class_embedding().parameters())}
        norms = {id(p) for module in self.net.modules() if isinstance(module, nn.GroupNorm | nn.LayerNorm) for p in module.parameters()}
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(which == "all" or name.endswith("bias") or id(parameter) in small | norms)


def noise_levels(normal: Tensor, *, smallest: float, largest: float) -> Tensor:
    """Training noise levels from standard normal numbers: log-normal (Karras et al. 2022, table 1) between two ends."""
    ends = (torch.tensor([smallest, largest], dtype=torch.float64).log() - _LOG_SIGMA_MEAN) / _LOG_SIGMA_STD
    low, high = torch.special.ndtr(ends)
    quantile = low + (high - low) * torch.special.ndtr(normal.double())
    levels: Tensor = (_LOG_SIGMA_MEAN + _LOG_SIGMA_STD * torch.special.ndtri(quantile)).exp()
    return levels.to(normal.dtype).clamp(smallest, largest)  # what rounding or an infinite quantile leaves


def stratified_normal(patients: int, draws: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers (patients * draws,): those of a patient, next to each other in random order, come one each from as many
    equally likely ranges. So a patient's few noise levels are spread over all there are, and each by itself is distributed as ever.
    """
    ranges = torch.rand((patients, draws), generator=generator).argsort(1)
    quantiles = (ranges + torch.rand((patients, draws), generator=generator, dtype=torch.float64)) / draws
    normal: Tensor = torch.special.ndtri(quantiles).flatten().float()
    return normal


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1 for _ in like.shape[1:]))
