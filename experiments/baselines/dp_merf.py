"""DP-MERF: one noised mean embedding of images and labels in random Fourier features, and a generator fitted to it (Harder et al. 2021)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from private import Clock, Made, Task, labels_like, noised_sum, one_release
from torch import Tensor, nn

from dpsynth.checks.statistics import pairwise
from dpsynth.data.cohort import Float32, Int64
from dpsynth.model.noised_sums import patient_sum

Array = NDArray[np.float64]
FEATURES = 2000  # cosines and sines together
COUNT_WEIGHT = 0.3
CODE, BATCH, LEARNING_RATE = 32, 100, 3e-3  # batch: images of each class in a step


class Embedding:
    """Random Fourier features of the Gaussian kernel (Rahimi and Recht 2007), of norm 1."""

    def __init__(self, public: Float32, *, seed: int) -> None:
        sample = public[:400].reshape(min(400, len(public)), -1).astype(np.float64)
        bandwidth = float(np.median(pairwise(sample, sample)[np.triu_indices(len(sample), 1)]))  # median heuristic, on public images
        frequencies = np.random.default_rng(seed).normal(size=(sample.shape[1], FEATURES // 2)) / bandwidth
        self.frequencies = torch.from_numpy(frequencies.astype(np.float32))

    def __call__(self, images: Tensor) -> Tensor:
        """(n, channel, height, width) to (n, FEATURES)."""
        angle = images.flatten(1) @ self.frequencies
        return torch.cat([angle.cos(), angle.sin()], dim=1) / math.sqrt(FEATURES / 2)


def embedding_sums(task: Task, embedding: Embedding) -> Array:
    """Sums over patients (classes, 1 + FEATURES) of the weighted count and the embedding of a class's images."""
    parts = [embedding(part).double().numpy() for part in torch.split(torch.from_numpy(task.training.images), 512)]
    rows = np.concatenate([np.full((len(task.training.images), 1), COUNT_WEIGHT), np.concatenate(parts)], axis=1)
    return patient_sum(rows.__getitem__, task.training.labels, task.training.patients, task.classes, query_norm())


def query_norm() -> float:
    """Clip norm of what a patient adds; float32 features may be a little longer than 1 and are clipped."""
    return math.hypot(1, COUNT_WEIGHT)


class Generator(nn.Module):
    """Code and class to an image: 7 or 8 positions a side, then doublings, each followed by a convolution to half the channels."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        doublings = 1
        while shape[1] >> doublings > 8:
            doublings += 1
        self.classes, self.start = classes, (64, shape[1] >> doublings, shape[2] >> doublings)
        self.dense = nn.Sequential(nn.Linear(CODE + classes, 128), nn.ReLU(), nn.Linear(128, math.prod(self.start)), nn.ReLU())
        widths = [64 >> level for level in range(doublings)] + [shape[0]]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers[:-1], nn.Tanh())

    def forward(self, code: Tensor, labels: Tensor) -> Tensor:
        """code (n, CODE), labels (n,) to images (n, *shape)."""
        joint = torch.cat([code, nn.functional.one_hot(labels, self.classes)], dim=1)
        return torch.as_tensor(self.convolutions(self.dense(joint).unflatten(1, self.start)))


def dp_merf(task: Task) -> Made:
    """Release once, fit the generator, draw labels as the noisy counts say."""
    clock = Clock()
    with clock.stage("rest"):
        release = one_release(task, clip_norm=query_norm())
    with clock.stage("training"):
        embedding = Embedding(task.public, seed=task.seed)
        noised = noised_sum(embedding_sums(task, embedding), release, task.stream())
        counts = np.maximum(noised[:, 0] / COUNT_WEIGHT, 1)
        generator = fit(task, embedding, torch.from_numpy((noised[:, 1:] / counts[:, None]).astype(np.float32)))
    with clock.stage("rest"):
        labels = labels_like(counts)
        images = draw(generator, labels, task.seed)
    return Made(images=images, labels=labels, mechanisms=(release,), seconds=clock.seconds)


def fit(task: Task, embedding: Embedding, wanted: Tensor) -> Generator:
    """The generator whose mean embedding of each class comes near the wanted one (classes, FEATURES)."""
    noise = torch.Generator().manual_seed(task.seed)
    with torch.random.fork_rng():
        torch.manual_seed(task.seed)
        generator = Generator(task.shape, task.classes)
    optimizer = torch.optim.Adam(generator.parameters(), LEARNING_RATE)
    labels = torch.arange(task.classes).repeat_interleave(BATCH)
    for _ in range(task.steps):
        images = generator(torch.randn(len(labels), CODE, generator=noise), labels)
        means = embedding(images).view(task.classes, BATCH, -1).mean(1)
        loss = (means - wanted).square().sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return generator


@torch.no_grad()
def draw(generator: nn.Module, labels: Int64, seed: int) -> Float32:
    """Images (n, *shape) in [-1, 1]."""
    generator.eval()
    code = torch.randn(len(labels), CODE, generator=torch.Generator().manual_seed(seed + 1))
    parts = [generator(*part) for part in zip(torch.split(code, 250), torch.split(torch.from_numpy(labels), 250), strict=True)]
    return np.asarray(torch.cat(parts).clamp(-1, 1).numpy(), dtype=np.float32)
