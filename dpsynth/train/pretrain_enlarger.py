"""Stage 0 of images that are drawn coarse first: a net for each doubling of their sides, from public images, at no cost in epsilon."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dpsynth.config import Config
from dpsynth.data.cohort import Float32
from dpsynth.data.halve import halved
from dpsynth.model.ema import Ema
from dpsynth.model.enlarger import LARGEST, SMALLEST, Enlarger
from dpsynth.progress import Progress
from dpsynth.train.pretrain import EMA_DECAY, kept, learning_rate_at

_CROP = {2: 32, 3: 16}  # pixels a side, by dimensions


def pretrained_enlargers(config: Config, images: Float32, *, progress: Progress) -> tuple[Enlarger, ...]:
    """One for each halving, coarsest first, from public `images` (n, channel, *spatial_shape); from the cache when trained before."""
    return tuple(
        _pretrained(config, halved(images, config.halvings - 1 - number), number=number, progress=progress)
        for number in range(config.halvings)
    )


def _pretrained(config: Config, images: Float32, *, number: int, progress: Progress) -> Enlarger:
    enlarger = _initial(config, images)

    def train() -> dict[str, Tensor]:
        _train(enlarger, config, images, number=number, progress=progress)
        return {name: tensor.contiguous() for name, tensor in enlarger.state_dict().items()}

    enlarger.load_state_dict(kept(config.pretrain, images, train, version=2, prefix="enlarger-"))
    return enlarger.eval()


def _initial(config: Config, images: Float32) -> Enlarger:
    with torch.random.fork_rng():  # the layers' initial weights are public; the global generator is left as it was
        torch.manual_seed(config.pretrain.seed)
        return Enlarger(channels=images.shape[1], dimensions=images.ndim - 2)


def _train(enlarger: Enlarger, config: Config, images: Float32, *, number: int, progress: Progress) -> None:
    settings, rng = config.pretrain, np.random.default_rng([config.pretrain.seed, number])
    noise = torch.Generator().manual_seed(settings.seed)
    ema, optimizer = Ema(enlarger, decay=EMA_DECAY), torch.optim.Adam(enlarger.parameters(), settings.learning_rate)
    ends = np.log([SMALLEST, LARGEST])
    enlarger.train()
    for step in range(settings.steps):
        clean = _crops(images, settings.rows_per_step(images.ndim - 2), rng)
        sigma = torch.from_numpy(np.exp(rng.uniform(ends[0], ends[1], size=len(clean))).astype(np.float32))
        detail = enlarger.split(clean)[1]
        loss = enlarger.row_losses(clean, sigma=sigma, noise=torch.randn(detail.shape, generator=noise)).mean()
        optimizer.param_groups[0]["lr"] = learning_rate_at(settings.learning_rate, step, settings.steps)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        ema.update(enlarger)
        if step % 10 == 9 or step + 1 == settings.steps:
            side = max(images.shape[2:])
            progress(f"pre-train detail of {side} pixels on public images", step + 1, settings.steps, f"loss {loss.item():.3f}, epsilon 0")
    ema.copy_to(enlarger)


def _crops(images: Float32, count: int, rng: np.random.Generator) -> Tensor:
    """Pieces of random images from one random place, at random contrast and brightness, (count, channel, *crop)."""
    sides = images.shape[2:]
    crop = [min(_CROP[len(sides)], side) for side in sides]
    corner = [int(2 * rng.integers((side - piece) // 2 + 1)) for side, piece in zip(sides, crop, strict=True)]
    place = tuple(slice(first, first + piece) for first, piece in zip(corner, crop, strict=True))
    pieces = images[rng.integers(len(images), size=count)][:, :, *place]
    each = (count, *(1 for _ in images.shape[1:]))
    changed = pieces * np.exp(rng.normal(0, 0.15, size=each)) + rng.normal(0, 0.1, size=each)
    return torch.from_numpy(np.ascontiguousarray(changed, dtype=np.float32))
