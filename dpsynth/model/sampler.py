"""Drawing images: the deterministic second-order sampler of Karras et al. 2022 (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsynth.progress import Progress

_RHO = 5.0
_BATCH = 250

DenoiseFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def schedule(steps: int, *, sigma_min: float, sigma_max: float) -> Tensor:
    """Noise levels from sigma_max to sigma_min and then 0, (steps + 1,) (equation 5)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (sigma_max ** (1 / _RHO) + ramp * (sigma_min ** (1 / _RHO) - sigma_max ** (1 / _RHO))) ** _RHO
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def starting_noise(seeds: NDArray[np.uint64], shape: tuple[int, ...]) -> Tensor:
    """Standard normal (n, *shape), row i from seed i alone, so an image does not depend on its batch."""
    rows = [np.random.default_rng(int(seed)).standard_normal(shape, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def heun(denoise: DenoiseFunction, x: Tensor, labels: Tensor, levels: Tensor) -> Tensor:
    """Integrate the probability flow from levels[0] to 0. x: (n, channel, *space) with noise of levels[0]."""

    def slope(at: Tensor, sigma: float) -> Tensor:
        return (at - denoise(at, torch.full((len(at),), sigma), labels)) / sigma

    for now, then in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        first = slope(x, now)
        euler = x + (then - now) * first
        x = euler if then == 0 else x + (then - now) * (first + slope(euler, then)) / 2
    return x


@torch.no_grad()
def sample(
    denoise: DenoiseFunction,
    start: Tensor,
    labels: Tensor,
    *,
    levels: Tensor,
    progress: Progress,
) -> NDArray[np.float32]:
    """Images (n, *shape) in [-1, 1] from `start` (n, *shape), images with noise of levels[0]; labels: (n,). Each is drawn by itself."""
    images = np.empty(tuple(start.shape), dtype=np.float32)
    for first in range(0, len(labels), _BATCH):
        part = slice(first, first + _BATCH)
        images[part] = heun(denoise, start[part], labels[part], levels).clamp(-1, 1).numpy()
        progress("draw images", min(first + _BATCH, len(labels)), len(labels))
    return images
