"""Drawing images: the stochastic second-order multistep solver SDE-DPM-Solver++(2M) of Lu et al. 2022, one call of the net a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsynth.progress import Progress

_RHO = 5.0
_BATCH = 250
STEP_NOISE, DETAIL_NOISE = 1, 2  # keys beside an image's seed: its noise after the first, and that of its finer detail

DenoiseFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
NoiseFunction = Callable[[], Tensor]


def schedule(steps: int, *, sigma_min: float, sigma_max: float) -> Tensor:
    """Noise levels from sigma_max to sigma_min and then 0, (steps + 1,) (Karras et al. 2022, equation 5)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (sigma_max ** (1 / _RHO) + ramp * (sigma_min ** (1 / _RHO) - sigma_max ** (1 / _RHO))) ** _RHO
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def starting_noise(seeds: NDArray[np.uint64], shape: tuple[int, ...]) -> Tensor:
    """Standard normal (n, *shape), row i from seed i alone, so an image does not depend on its batch."""
    return normal_numbers([np.random.default_rng(int(seed)) for seed in seeds], shape)


def streams_of(seeds: NDArray[np.uint64], *key: int) -> list[np.random.Generator]:
    """A stream of random numbers for each image from its seed, another one for each key."""
    return [np.random.default_rng([int(seed), *key]) for seed in seeds]


def normal_numbers(streams: list[np.random.Generator], shape: tuple[int, ...]) -> Tensor:
    """The next standard normal numbers of each stream, (n, *shape)."""
    return torch.from_numpy(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]))


def solve(denoise: DenoiseFunction, x: Tensor, labels: Tensor, levels: Tensor, *, noise: NoiseFunction | None = None) -> Tensor:
    """Integrate from levels[0] to 0. x: (n, channel, *space) with noise of levels[0]; labels: (n, ...), what `denoise` is told of
    each row.

    noise: the next standard normal numbers of the shape of x, with which the reverse diffusion is integrated (Lu et al. 2022, the
    multistep solver of order two for the equation with noise, data prediction); none: the probability flow. Noise that is added on the
    way lets later steps mend what a net drew wrongly in earlier ones.
    """
    before: Tensor | None = None
    width = 0.0  # of the step before, in the logarithm of the level
    for now, then in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        clean = denoise(x, torch.full((len(x),), now), labels)
        if then == 0:
            return clean
        h = math.log(now / then)
        ahead = clean if before is None else clean + (clean - before) * h / (2 * width)
        if noise is None:
            x = then / now * x - math.expm1(-h) * ahead
        else:
            x = then / now * math.exp(-h) * x - math.expm1(-2 * h) * ahead + then * math.sqrt(-math.expm1(-2 * h)) * noise()
        before, width = clean, h
    return x


@torch.no_grad()
def sample(
    denoise: DenoiseFunction,
    start: Tensor,
    labels: Tensor,
    *,
    levels: Tensor,
    streams: list[np.random.Generator],
    progress: Progress,
) -> NDArray[np.float32]:
    """Images (n, *shape) in [-1, 1] from `start` (n, *shape), which has noise of levels[0], each by itself.

    labels: (n, ...), as in `solve`. streams: of each image, from which its noise on the way is taken.
    """
    images = np.empty(tuple(start.shape), dtype=np.float32)
    for first in range(0, len(labels), _BATCH):
        part = slice(first, first + _BATCH)
        noise = partial(normal_numbers, streams[part], tuple(start.shape[1:]))
        images[part] = solve(denoise, start[part], labels[part], levels, noise=noise).clamp(-1, 1).numpy()
        progress("draw images", min(first + _BATCH, len(labels)), len(labels))
    return images
