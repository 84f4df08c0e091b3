"""Diffusion models overfitted without differential privacy, for the zoo: a small one, and the project's own net."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dpsynth.config import DiffusionConfig
from dpsynth.data.cohort import Float32, ImageSet
from dpsynth.model.denoiser import Denoiser
from dpsynth.model.generator import Generator
from dpsynth.model.moment_release import release_moments
from dpsynth.model.moments import public_reference
from dpsynth.model.sampler import schedule, solve, starting_noise
from dpsynth.privacy.noise import NoiseStream
from dpsynth.progress import silent
from dpsynth.train.non_private import fit_non_private

_LARGEST, _SMALLEST, _DRAW_STEPS = 5.0, 0.02, 32
_CHANNELS = (8, 16)


class SmallDenoiser(nn.Module):
    """Class-conditional denoiser at all noise levels: attention over pictures that it learns from public ones on."""

    def __init__(self, public: Float32, classes: int) -> None:
        super().__init__()
        self.pictures = nn.Parameter(torch.from_numpy(public).flatten(1).clone())
        self.leaning = nn.Parameter(torch.zeros(len(public), classes))  # of each picture to each class
        self.log_width = nn.Parameter(torch.tensor(-1.6))

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        likeness = noisy.flatten(1) @ self.pictures.T - self.pictures.square().sum(1) / 2
        weights = likeness / (sigma[:, None] ** 2 + (2 * self.log_width).exp()) + self.leaning[:, labels].T
        return (weights.softmax(1) @ self.pictures).view_as(noisy)


def overfitted(training: ImageSet, public: Float32, *, steps: int = 500) -> SmallDenoiser:
    """Denoising score matching without clipping and without noise, for long on few patients."""
    x, y = torch.from_numpy(training.images), torch.from_numpy(training.labels)
    draw, net = torch.Generator().manual_seed(0), SmallDenoiser(public, len(training.classes))
    optimizer = torch.optim.Adam(net.parameters(), 2e-2)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=draw)
        sigma = (torch.randn(len(rows), generator=draw) * 1.2 - 0.5).exp()
        noisy = x[rows] + sigma[:, None, None, None] * torch.randn(x[rows].shape, generator=draw)
        errors = (net(noisy, sigma, y[rows]) - x[rows]).square().flatten(1).mean(1)
        optimizer.zero_grad()
        (errors / (sigma**2 + 0.05)).mean().backward()
        optimizer.step()
        rates.step()
    return net


@torch.no_grad()
def drawn_by(net: SmallDenoiser, labels: np.ndarray, shape: tuple[int, ...], *, seed: int) -> Float32:
    """Images (n, *shape) of the labels (n,)."""
    noise = _LARGEST * starting_noise(np.arange(len(labels)).astype(np.uint64) + np.uint64(1000 * seed), shape)
    levels = schedule(_DRAW_STEPS, sigma_min=_SMALLEST, sigma_max=_LARGEST)
    return solve(net, noise, torch.from_numpy(labels), levels).clamp(-1, 1).float().numpy()


def without_privacy(training: ImageSet, public: ImageSet, *, steps: int = 150) -> Generator:
    """The project's own net around exact moments of public images, so that the net alone has seen the patients."""
    reference = public_reference(public.images, low_frequencies=6)
    moments = release_moments(
        public.images, public.labels, public.patients, num_classes=len(public.classes), mechanism=None, reference=reference, stream=None
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = Denoiser(moments, channels=_CHANNELS)
    settings = DiffusionConfig(
        channels=_CHANNELS, steps=steps, sampling_probability=0.2, draws=2, learning_rate=6e-3, ema_decay=0.9, trainable="all"
    )
    fit_non_private(denoiser, training, settings, stream=NoiseStream(key=b"o" * 32), progress=silent)
    return Generator(classes=training.classes, moments=moments, denoiser=denoiser, net_channels=_CHANNELS, texture=True)
