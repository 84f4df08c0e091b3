"""DPDM: DP-SGD on all weights of an EDM denoiser with several noise draws a patient (Dockhorn et al. 2023), and its non-private ceiling."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from edm import EdmDenoiser, balanced, fit_public
from private import COUNT, Clock, Losses, Made, Task, booked_sgd, ema_for, labels_like, private_steps
from torch import Tensor

from dpsynth.data.cohort import Int64
from dpsynth.privacy.mechanism import NonPrivate, PoissonDpSgd

PATIENTS_A_STEP, DRAWS = 100, 4
CLIP_NORM, LEARNING_RATE = 0.01, 2e-3  # so small a clip norm that every patient is clipped


def dpdm(task: Task) -> Made:
    """Train from scratch and draw balanced labels: the method releases no class frequencies."""
    clock = Clock()
    with clock.stage("rest"):
        mechanism = booked_sgd(task, sampling_probability=sampling_probability(task), clip_norm=CLIP_NORM)
    with clock.stage("training"):
        denoiser = EdmDenoiser(task.shape, task.classes, seed=task.seed)
        fit(denoiser, task, mechanism)
    with clock.stage("rest"):
        labels = balanced(task.classes, COUNT)
        images = denoiser.draw(labels, task.seed)
    return Made(images=images, labels=labels, mechanisms=(mechanism,), seconds=clock.seconds)


def sampling_probability(task: Task) -> float:
    """From the public size of the set."""
    return PATIENTS_A_STEP / task.declared_patients


def fit(denoiser: EdmDenoiser, task: Task, mechanism: PoissonDpSgd) -> None:
    """DP-SGD in place; afterwards the denoiser holds the averaged weights."""
    net = denoiser.net
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    private_steps(net, task, mechanism, row_losses(denoiser, task), rows=DRAWS, optimizer=optimizer, ema=ema_for(net, mechanism.steps))


def row_losses(denoiser: EdmDenoiser, task: Task) -> Losses:
    """The denoiser's loss on each row."""
    images, labels = torch.from_numpy(task.training.images), torch.from_numpy(task.training.labels)

    def losses(index: Int64, generator: torch.Generator) -> Callable[[], Tensor]:
        return lambda: denoiser.row_losses(images[index], labels[index], generator)

    return losses


def ceiling(task: Task) -> Made:
    """The same net with neither clip nor noise, and true class frequencies: what privacy costs is the distance to this."""
    clock = Clock()
    with clock.stage("training"):
        denoiser = EdmDenoiser(task.shape, task.classes, seed=task.seed)
        fit_public(denoiser, task.training.images, task.training.labels, steps=task.steps, seed=task.seed, augment=False)
    with clock.stage("rest"):
        labels = labels_like(np.bincount(task.training.labels, minlength=task.classes))
        images = denoiser.draw(labels, task.seed)
    return Made(images=images, labels=labels, mechanisms=(NonPrivate(reason="ceiling"),), seconds=clock.seconds)
