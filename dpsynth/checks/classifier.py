"""A small classifier for train-on-synthetic, test-on-real: the same for every arm, deterministic from its seed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch import Tensor, nn

from dpsynth.data.cohort import Float32, Int64
from dpsynth.progress import Progress

Array = NDArray[np.float64]
_STEPS = 600
_BATCH = 64
_PEAK_LEARNING_RATE = 2e-3
_SIDES = {2: 32, 3: 16}  # by dimensions, to which images are averaged down; a volume of 32 would take ten times as long as one of 16
_GRAIN = 0.02  # noise on each pixel of a training image


class Classifier(nn.Module):
    """Three convolutions; larger images are averaged down to a fixed side first, so time does not grow with size."""

    def __init__(self, *, dimensions: int, channels: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        convolution = nn.Conv2d if dimensions == 2 else nn.Conv3d
        widths = (channels, 16, 32, 64)
        self.layers = nn.ModuleList(convolution(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.head = nn.Linear(64 * 3**dimensions, classes)
        self.pool = F.adaptive_avg_pool2d if dimensions == 2 else F.adaptive_avg_pool3d
        self.halve = F.max_pool2d if dimensions == 2 else F.max_pool3d
        for parameter in self.parameters():
            bound = 1 / np.sqrt(max(parameter[0].numel(), 1)) if parameter.dim() > 1 else 0.0
            with torch.no_grad():
                parameter.uniform_(-bound, bound, generator=generator) if bound else parameter.zero_()

    def small(self, x: Tensor) -> Tensor:
        """Images (n, channel, *space) averaged down to at most 32 px, volumes to 16, laid out as convolutions on a CPU are fastest."""
        largest = _SIDES[x.dim() - 2]
        if max(x.shape[2:]) > largest:
            x = self.pool(x, [min(largest, side) for side in x.shape[2:]])  # type: ignore[arg-type]
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, channel, *space) to logits (n, classes)."""
        x = self.small(x)
        for index, layer in enumerate(self.layers):
            x = layer(x)
            x = F.relu(self.halve(x, 2) if index < 2 else x)  # the same as in the usual order, on a quarter of the pixels
        return torch.as_tensor(self.head(self.pool(x, 3).flatten(1)))


def train_and_predict(images: Float32, labels: Int64, test: Float32, *, classes: int, seed: int, task: str, progress: Progress) -> Array:
    """Class probabilities (n_test, classes) of a classifier trained on `images`, classes drawn equally often."""
    generator = torch.Generator().manual_seed(seed)
    net = Classifier(dimensions=images.ndim - 2, channels=images.shape[1], classes=classes, generator=generator)
    if images.ndim == 4:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LEARNING_RATE, total_steps=_STEPS)
    x, y = torch.cat([net.small(part) for part in torch.split(torch.from_numpy(images), 256)]), torch.from_numpy(labels)
    grain = _GRAIN * (x[0].numel() / images[0].size) ** 0.5  # what is left of it when it is averaged down with the image
    frequency = torch.bincount(y, minlength=classes).clamp(min=1).float()
    weights = (1 / frequency)[y]
    for step in range(_STEPS):
        rows = torch.multinomial(weights, _BATCH, replacement=True, generator=generator)
        batch = x[rows]
        batch = batch + grain * torch.randn(batch.shape, generator=generator)
        loss = F.cross_entropy(net(batch), y[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            progress(f"classifier on {task}", step + 1, _STEPS)
    with torch.no_grad():
        return torch.cat([net(part).softmax(1) for part in torch.split(torch.from_numpy(test), 256)]).double().numpy()


def auc(probabilities: Array, labels: Int64) -> float:
    """Area under the ROC curve, macro average one-against-rest; classes absent from `labels` are left out."""
    present = np.unique(labels)
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    return float(np.mean([roc_auc_score(labels == label, probabilities[:, label]) for label in present]))


def balanced_accuracy(probabilities: Array, labels: Int64) -> float:
    """Mean recall over classes."""
    return float(balanced_accuracy_score(labels, probabilities.argmax(axis=1)))


def worst_recall(probabilities: Array, labels: Int64) -> float:
    """The smallest recall among the classes that occur in `labels` (n,). probabilities: (n, classes)."""
    return min(recalls(probabilities, labels).values())


def recalls(probabilities: Array, labels: Int64) -> dict[int, float]:
    """Recall by class, of the classes that occur in `labels` (n,)."""
    predicted = probabilities.argmax(axis=1)
    return {int(label): float((predicted[labels == label] == label).mean()) for label in np.unique(labels)}
