"""What one gets by putting the tutorials of MONAI (DDPM) and Opacus (DP-SGD) together: epsilon prediction, batch 64, clip norm 1,
one draw, no average of weights. Gradients by Opacus' own hooks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from edm import balanced, unet
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from opacus import GradSampleModule
from private import COUNT, Clock, Gradients, Losses, Made, Task, booked_sgd, private_steps
from torch import Tensor, nn

from dpsynth.data.cohort import Float32, Int64
from dpsynth.model.packing import Packing

BATCH, CLIP_NORM, LEARNING_RATE = 64, 1.0, 1e-3
LEVELS, SAMPLER_STEPS = 1000, 50


def tutorial_loop(task: Task) -> Made:
    """Train and draw balanced labels."""
    clock = Clock()
    with clock.stage("rest"):
        mechanism = booked_sgd(task, sampling_probability=BATCH / task.declared_patients, clip_norm=CLIP_NORM)
    with clock.stage("training"):
        net, packing = unet(task.shape, task.classes, task.seed)
        hooked = GradSampleModule(net)
        optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE)
        private_steps(
            net, task, mechanism, row_losses(hooked, packing, task), rows=1, optimizer=optimizer, gradients=per_row(hooked)
        )  # fmt: skip
        hooked.remove_hooks()
    with clock.stage("rest"):
        labels = balanced(task.classes, COUNT)
        images = draw(net, packing, labels, task)
    return Made(images=images, labels=labels, mechanisms=(mechanism,), seconds=clock.seconds)


def per_row(hooked: GradSampleModule) -> Gradients:
    """Opacus' gradients of each row, [(rows, *shape)]."""

    def gradients(losses: Callable[[], Tensor]) -> list[Tensor]:
        hooked.zero_grad()
        losses().mean().backward()  # type: ignore[no-untyped-call]
        return [parameter.grad_sample.detach() for parameter in hooked.parameters()]

    return gradients


def row_losses(hooked: nn.Module, packing: Packing, task: Task) -> Losses:
    """Mean squared error of the predicted noise at a random level (Ho et al. 2020, equation 14)."""
    scheduler = DDPMScheduler(num_train_timesteps=LEVELS)
    images, labels = torch.from_numpy(task.training.images), torch.from_numpy(task.training.labels)

    def losses(index: Int64, generator: torch.Generator) -> Callable[[], Tensor]:
        clean = packing.pack(images[index])
        level = torch.randint(LEVELS, (len(index),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = scheduler.add_noise(clean, noise, level)
        return lambda: (hooked(noisy, level, class_labels=labels[index]) - noise).square().flatten(1).mean(1)

    return losses


@torch.no_grad()
def draw(net: nn.Module, packing: Packing, labels: Int64, task: Task) -> Float32:
    """Images (n, *shape) in [-1, 1]. 50 deterministic steps: the 1,000 of the tutorial would take ten times the training."""
    net.eval()
    scheduler, generator = DDIMScheduler(num_train_timesteps=LEVELS), torch.Generator().manual_seed(task.seed)
    scheduler.set_timesteps(SAMPLER_STEPS)
    shape = packing.pack(torch.zeros(1, *task.shape)).shape[1:]
    parts = []
    for wanted in torch.split(torch.from_numpy(labels), 250):
        x = torch.randn(len(wanted), *shape, generator=generator)
        for level in scheduler.timesteps:
            x, _ = scheduler.step(net(x, level.expand(len(x)), class_labels=wanted), int(level), x)
        parts.append(packing.unpack(x).clamp(-1, 1))
    drawn: Float32 = torch.cat(parts).numpy()
    return drawn
