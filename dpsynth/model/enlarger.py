"""Twice the sides, with detail that public images alone have taught.

What a net can learn from the patients of a hospital is the coarse image (`config.halvings`); fine detail is much alike everywhere. So an
image is drawn at half its sides and becomes the mean of each cell of 2^d pixels of the full one; the other 2^d - 1 Haar coefficients of the
cell are drawn by a diffusion of their own, given the coarse image (cascaded diffusion, Ho et al. 2022; on wavelets, Guth et al. 2022). The
net has seen no private image and what it enlarges was released, so this is post-processing. It learns on crops, works on images of any
size, and the mean over the cells of what it draws is the coarse image, but for the clamp to [-1, 1].
"""

from __future__ import annotations

import numpy as np
import torch
from monai.networks.nets import SegResNet
from numpy.typing import NDArray
from scipy.linalg import hadamard
from torch import Tensor, nn

from dpsynth.model.packing import depth_to_space, space_to_depth
from dpsynth.model.sampler import DETAIL_NOISE, normal_numbers, sample, schedule, streams_of
from dpsynth.progress import Progress

Float32 = NDArray[np.float32]

LARGEST, SMALLEST = 0.5, 0.02  # noise levels of detail that the net learns
_END, _STEPS = 0.05, 4  # last level and steps of drawing
_STDDEV = 0.1  # typical of detail, for images in [-1, 1]
_CONTRAST = 0.5  # typical of the coarse image
_FILTERS = 32


class Enlarger(nn.Module):
    """A denoiser of Haar detail given the coarse image, preconditioned as in Karras et al. 2022 (table 1).

    channels, dimensions: of the images. The noise level is told to the net as one more channel.
    """

    def __init__(self, *, channels: int, dimensions: int) -> None:
        super().__init__()
        self.channels, self.cell = channels, 2**dimensions
        detail = channels * (self.cell - 1)
        self.register_buffer("haar", torch.from_numpy(hadamard(self.cell) / self.cell**0.5).float(), persistent=False)
        self.net = SegResNet(
            spatial_dims=dimensions, init_filters=_FILTERS, in_channels=detail + channels + 1, out_channels=detail,
            blocks_down=(1, 2), blocks_up=(1,),
        )  # fmt: skip
        for parameter in self.net.conv_final[-1].parameters():
            nn.init.zeros_(parameter)

    def split(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, channel, *space) to their mean over cells (n, channel, *space / 2) and detail (n, channel * (2^d - 1), *space / 2)."""
        packed = space_to_depth(images, 2)
        cells = packed.reshape(len(packed), self.channels, self.cell, *packed.shape[2:])
        coefficients = torch.einsum("kc,nac...->nak...", self.get_buffer("haar"), cells)
        return coefficients[:, :, 0] / self.cell**0.5, coefficients[:, :, 1:].flatten(1, 2)

    def join(self, coarse: Tensor, detail: Tensor) -> Tensor:
        """Inverse of `split`."""
        own = detail.reshape(len(detail), self.channels, self.cell - 1, *detail.shape[2:])
        coefficients = torch.cat([coarse[:, :, None] * self.cell**0.5, own], dim=2)
        packed = torch.einsum("kc,nak...->nac...", self.get_buffer("haar"), coefficients)
        return depth_to_space(packed.flatten(1, 2), 2)

    def forward(self, noisy: Tensor, sigma: Tensor, coarse: Tensor) -> Tensor:
        """Detail (n, channel * (2^d - 1), *space / 2) with noise of sigma (n,) to the denoised, given `coarse` (n, channel, *space / 2)."""
        level = _column(sigma, noisy)
        total = level.square() + _STDDEV**2
        known = ((level.log() + 2) / 2).expand(-1, 1, *noisy.shape[2:])
        correction = self.net(torch.cat([noisy / total.sqrt(), coarse / _CONTRAST, known], dim=1))
        denoised: Tensor = _STDDEV**2 / total * noisy + level * _STDDEV / total.sqrt() * correction
        return denoised

    def row_losses(self, images: Tensor, *, sigma: Tensor, noise: Tensor) -> Tensor:
        """Squared error of the detail of each of the images (n, channel, *space), all levels alike at the start, (n,). noise: as detail."""
        coarse, detail = self.split(images)
        level = _column(sigma, detail)
        weight = (level.square() + _STDDEV**2) / (level * _STDDEV).square()
        error: Tensor = (weight * (self(detail + level * noise, sigma, coarse) - detail).square()).flatten(1).mean(1)
        return error

    def enlarged(self, images: Float32, seeds: NDArray[np.uint64], *, number: int, progress: Progress) -> Float32:
        """Images (n, channel, *space) to (n, channel, *2 space), image i with the noise of seed i. number: of enlargements before."""
        self.eval()
        coarse, shape = torch.from_numpy(images), (self.channels * (self.cell - 1), *images.shape[2:])
        streams, levels = streams_of(seeds, DETAIL_NOISE, number), schedule(_STEPS, sigma_min=_END, sigma_max=LARGEST)
        start = normal_numbers(streams, shape) * (LARGEST**2 + _STDDEV**2) ** 0.5
        detail = sample(self, start, coarse, levels=levels, streams=streams, progress=progress)
        return self.join(coarse, torch.from_numpy(detail)).clamp(-1, 1).numpy()


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1 for _ in like.shape[1:]))
