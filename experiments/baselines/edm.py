"""A class-conditional denoiser in the preconditioning of Karras et al. 2022 (section 5, table 1) around MONAI's U-Net.

The net has the shape of ours (attention at the lower level), so that a comparison is about the method.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import DiffusionModelUNet
from private import ema_for
from torch import Tensor, nn

from dpsynth.config import GenerateConfig
from dpsynth.data.cohort import Float32, Int64
from dpsynth.generate import image_seeds
from dpsynth.model.packing import Packing
from dpsynth.model.sampler import STEP_NOISE, sample, schedule, starting_noise, streams_of
from dpsynth.progress import silent

SIGMA_DATA = math.sqrt(1 / 3)  # of a uniform pixel in [-1, 1]; public
LOG_SIGMA_MEAN, LOG_SIGMA_STD = -1.2, 1.2
CHANNELS = (32, 64)
_STEPS, _SIGMA_MAX = 28, 20.0


def unet(shape: tuple[int, ...], classes: int, seed: int) -> tuple[DiffusionModelUNet, Packing]:
    """The U-Net for images of `shape` (channel, *space), and how they are packed for it."""
    packing = Packing(shape[1:], levels=len(CHANNELS))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DiffusionModelUNet(
            spatial_dims=len(shape) - 1,
            in_channels=packing.channels(shape[0]),
            out_channels=packing.channels(shape[0]),
            num_res_blocks=1,
            channels=CHANNELS,
            attention_levels=(False, True),
            norm_num_groups=16,
            num_head_channels=32,
            num_class_embeds=classes,
        )
    return net, packing


class EdmDenoiser(nn.Module):
    """D(x; sigma, c) = c_skip x + c_out F(c_in x; c_noise, c)."""

    def __init__(self, shape: tuple[int, ...], classes: int, *, seed: int) -> None:
        super().__init__()
        self.shape = shape
        self.net, self.packing = unet(shape, classes, seed)

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """noisy (n, channel, *space), sigma (n,), labels (n,) to the denoised images."""
        level = self._column(sigma)
        return self._skip(level) * noisy + self._out(level) * self._raw(noisy, sigma, labels)

    def row_losses(self, clean: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Weighted squared error of each row at a random noise level, (n,); the weight makes all levels count alike at the start."""
        sigma = (LOG_SIGMA_MEAN + LOG_SIGMA_STD * torch.randn(len(clean), generator=generator)).exp()
        level = self._column(sigma)
        noisy = clean + level * torch.randn(clean.shape, generator=generator)
        target = (clean - self._skip(level) * noisy) / self._out(level)
        return (self._raw(noisy, sigma, labels) - target).square().flatten(1).mean(1)

    def _raw(self, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        scaled = noisy / (self._column(sigma).square() + SIGMA_DATA**2).sqrt()
        return self.packing.unpack(self.net(self.packing.pack(scaled), sigma.log() * 250 + 1000, class_labels=labels))

    def _column(self, sigma: Tensor) -> Tensor:
        return sigma.view(-1, *(1 for _ in self.shape))

    def _skip(self, level: Tensor) -> Tensor:
        return SIGMA_DATA**2 / (level.square() + SIGMA_DATA**2)

    def _out(self, level: Tensor) -> Tensor:
        return level * SIGMA_DATA / (level.square() + SIGMA_DATA**2).sqrt()

    def draw(self, labels: Int64, seed: int) -> Float32:
        """Images (n, *shape) in [-1, 1] by our sampler in 28 steps, to the noise level that is our default."""
        self.eval()
        levels = schedule(_STEPS, sigma_min=GenerateConfig().sigma_min, sigma_max=_SIGMA_MAX)
        seeds = image_seeds(seed, len(labels))
        start = starting_noise(seeds, self.shape) * _SIGMA_MAX
        return sample(self, start, torch.from_numpy(labels), levels=levels, streams=streams_of(seeds, STEP_NOISE), progress=silent)


def fit_public(denoiser: EdmDenoiser, images: Float32, labels: Int64, *, steps: int, seed: int, augment: bool) -> None:
    """Train in place without noise on images that need no protection (n, *shape), or for a ceiling. Batches of 96, Adam 1e-3, EMA."""
    generator = torch.Generator().manual_seed(seed)
    optimizer, ema = torch.optim.Adam(denoiser.net.parameters(), 1e-3), ema_for(denoiser.net, steps)
    clean, wanted = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(steps):
        rows = torch.randint(len(clean), (96,), generator=generator)
        batch = _augmented(clean[rows], generator) if augment else clean[rows]
        loss = denoiser.row_losses(batch, wanted[rows], generator).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        ema.update(denoiser.net)
    ema.copy_to(denoiser.net)


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Small shifts, scales, contrast and brightness, each image its own: what one central image can stand for."""
    n = len(images)
    draw = torch.randn((n, 5), generator=generator)
    matrix = torch.zeros(n, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1] = 1 + 0.06 * draw[:, 0], 1 + 0.06 * draw[:, 1]
    matrix[:, :, 2] = 0.06 * draw[:, 2:4]
    moved = F.grid_sample(
        images, F.affine_grid(matrix, list(images.shape), align_corners=False), padding_mode="border", align_corners=False
    )
    gain = (0.15 * draw[:, 4]).exp().view(-1, 1, 1, 1)
    shift = 0.1 * torch.randn((n, 1, 1, 1), generator=generator)
    return (moved * gain + shift).clamp(-1, 1)


def balanced(classes: int, count: int) -> Int64:
    """Labels (count,), every class equally often."""
    return np.arange(count, dtype=np.int64) % classes
