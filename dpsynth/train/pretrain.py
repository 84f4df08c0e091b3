"""Stage 0: train the denoiser on public images, at no cost in epsilon.

The private moments are unknown here, so the net must be at home under any: every few steps the public images are cut into new
pseudo-classes by a random direction, their exact moments are computed, and images and moments are mirrored and rescaled alike.
Noised moments were tried in their place and lost (experiments/001): the net then trusts the public images more than the moments.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from dpsynth.artifacts import write_bytes
from dpsynth.config import Config, PretrainConfig
from dpsynth.data.cohort import Float32, Int64
from dpsynth.model.denoiser import Denoiser, noise_levels
from dpsynth.model.ema import Ema
from dpsynth.model.moment_release import release_moments
from dpsynth.model.moments import PublicReference, frequencies, to_frequencies
from dpsynth.progress import Progress

_REFRESH = 50  # steps between new pseudo-classes
_WARM_UP = 20
EMA_DECAY = 0.98


def pretrained_weights(config: Config, images: Float32, reference: PublicReference, *, progress: Progress) -> dict[str, Tensor]:
    """Weights of the U-Net after pre-training on public `images`; from the cache folder when equal settings were trained before."""
    facts = [list(config.diffusion.channels), config.moments.low_frequencies, len(config.data.cells)]
    return kept(config.pretrain, images, lambda: _train(config, images, reference, progress=progress), version=9, facts=facts)


def kept(
    settings: PretrainConfig,
    images: Float32,
    train: Callable[[], dict[str, Tensor]],
    *,
    version: int,
    facts: Sequence[object] = (),
    prefix: str = "",
) -> dict[str, Tensor]:
    """Weights that `train` makes of public `images`; from the cache folder when equal ones were made before.

    version, facts, prefix: beside settings and images everything that the weights depend on. The images are public, so their hash may be
    a file name.
    """
    if settings.cache is None:
        return train()
    known = [version, settings.model_dump(mode="json", exclude={"cache", "path"}), *facts]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    digest.update(images.tobytes())
    path = settings.cache / f"{prefix}{digest.hexdigest()[:32]}.safetensors"
    if path.is_file():
        return dict(load_file(path))
    weights = train()
    write_bytes(path, save(weights))
    return weights


def _train(config: Config, images: Float32, reference: PublicReference, *, progress: Progress) -> dict[str, Tensor]:
    settings, rng = config.pretrain, np.random.default_rng(config.pretrain.seed)
    noise = torch.Generator().manual_seed(settings.seed)
    world = _World(images, reference, num_classes=len(config.data.cells), rng=rng)
    with torch.random.fork_rng():  # the layers' initial weights are public; the global generator is left as it was
        torch.manual_seed(settings.seed)
        denoiser = Denoiser(world.moments, channels=config.diffusion.channels)
    ema = Ema(denoiser.net, decay=EMA_DECAY)
    optimizer = torch.optim.Adam(denoiser.net.parameters(), settings.learning_rate)
    for step in range(settings.steps):
        if step % _REFRESH == 0:
            world = _World(images, reference, num_classes=len(config.data.cells), rng=rng)
            denoiser.transplant(world.moments)
        clean, labels = world.batch(settings.rows_per_step(images.ndim - 2), rng)
        sigma = noise_levels(torch.randn(len(clean), generator=noise), smallest=0.02, largest=denoiser.largest_sigma)
        losses = denoiser.row_losses(clean, labels, sigma=sigma, noise=torch.randn(clean.shape, generator=noise))
        optimizer.param_groups[0]["lr"] = learning_rate_at(settings.learning_rate, step, settings.steps)
        optimizer.zero_grad()
        losses.mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        ema.update(denoiser.net)
        if step % 10 == 9 or step + 1 == settings.steps:
            progress("pre-train on public images", step + 1, settings.steps, f"loss {losses.mean().item():.3f}, epsilon 0")
    ema.copy_to(denoiser.net)
    return {name: tensor.detach().clone().contiguous() for name, tensor in denoiser.net.state_dict().items()}


def learning_rate_at(peak: float, step: int, steps: int) -> float:
    """Warm-up, then a cosine to a twentieth."""
    return peak * min(1.0, (step + 1) / _WARM_UP) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))


class _World:
    """Public images seen as one data set among many: pseudo-classes, a contrast, a mirror, and the moments that go with them."""

    def __init__(self, images: Float32, reference: PublicReference, *, num_classes: int, rng: np.random.Generator) -> None:
        layout = frequencies(reference.shape, reference.low_frequencies)
        mirrored = images[..., ::-1] if rng.random() < 0.5 and images.ndim == 4 else images
        scale, shift = float(np.exp(rng.normal(0, 0.15))), float(rng.normal(0, 0.1))
        self.images = np.asarray(mirrored * scale + shift, dtype=np.float32)
        coefficients = to_frequencies(self.images)[:, layout.low]
        direction = rng.normal(size=coefficients.shape[1]) / (coefficients.std(axis=0) + 1e-3)
        score = (coefficients - coefficients.mean(axis=0)) @ direction
        score = score + rng.random() * score.std() * rng.normal(size=len(score))
        shares = np.sort(rng.dirichlet(np.full(num_classes, 4.0)).cumsum()[:-1])
        self.labels: Int64 = np.searchsorted(np.quantile(score, shares), score).astype(np.int64)
        keep = rng.random(len(images)) < rng.uniform(0.5, 1.0)
        self.rows = np.flatnonzero(keep) if keep.sum() > 20 * num_classes else np.arange(len(images))
        rows = self.rows
        self.moments = release_moments(
            self.images[rows],
            self.labels[rows],
            np.arange(len(rows), dtype=np.int64),
            num_classes=num_classes,
            mechanism=None,
            reference=reference,
            stream=None,
        )

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        rows = self.rows[rng.integers(len(self.rows), size=size)]
        return torch.from_numpy(self.images[rows]), torch.from_numpy(self.labels[rows])
