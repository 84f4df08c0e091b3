"""DP-CGAN: DP-SGD on the discriminator of a conditional GAN (Torkzadehmahani et al. 2019), with several of its steps to one of the
generator (Bie et al. 2023, "Private GANs, revisited"). The generator sees the data through the private discriminator alone.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from dp_merf import CODE, Generator, draw
from edm import balanced
from private import COUNT, Clock, Losses, Made, Task, booked_sgd, private_steps
from torch import Tensor, nn

from dpsynth.data.cohort import Int64

CLIP_NORM, LEARNING_RATE, BETAS = 0.1, 5e-4, (0.5, 0.9)
STEPS_TO_ONE = 5  # discriminator steps to one of the generator
BATCH = 128  # of the generator


class Discriminator(nn.Module):
    """Image and class to a logit of being real. No batch norm: it would mix patients."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.classes = classes
        widths = (shape[0] + classes, 16, 32, 64)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths))
        self.head = nn.Linear(64 * (shape[1] // 8) * (shape[2] // 8), 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """images (n, *shape), labels (n,) to logits (n,)."""
        planes = F.one_hot(labels, self.classes).float()[:, :, None, None].expand(-1, -1, *images.shape[2:])
        x = torch.cat([images, planes], dim=1)
        for layer in self.convolutions:
            x = F.leaky_relu(layer(x), 0.2)
        return torch.as_tensor(self.head(x.flatten(1))[:, 0])


def dp_cgan(task: Task) -> Made:
    """Train both nets and draw balanced labels."""
    clock = Clock()
    with clock.stage("rest"):
        mechanism = booked_sgd(task, sampling_probability=128 / task.declared_patients, clip_norm=CLIP_NORM)
    with clock.stage("training"):
        with torch.random.fork_rng():
            torch.manual_seed(task.seed)
            generator, discriminator = Generator(task.shape, task.classes), Discriminator(task.shape, task.classes)
        private_steps(
            discriminator, task, mechanism, pair_losses(generator, discriminator, task), rows=2,
            optimizer=torch.optim.Adam(discriminator.parameters(), LEARNING_RATE, betas=BETAS),
            after_step=generator_step(generator, discriminator, task),
        )  # fmt: skip
    with clock.stage("rest"):
        labels = balanced(task.classes, COUNT)
        images = draw(generator, labels, task.seed)
    return Made(images=images, labels=labels, mechanisms=(mechanism,), seconds=clock.seconds)


def pair_losses(generator: nn.Module, discriminator: nn.Module, task: Task) -> Losses:
    """Losses of a patient's two rows: one real image, and in place of the second a generated one of a random class.

    Both are clipped as one gradient, so a patient who leaves takes one clipped vector along.
    """
    images, labels = torch.from_numpy(task.training.images), torch.from_numpy(task.training.labels)

    def losses(index: Int64, noise: torch.Generator) -> Callable[[], Tensor]:
        rows, wanted = images[index], labels[index].clone()
        fake = torch.arange(len(index)) % 2 == 1
        wanted[fake] = torch.randint(task.classes, (int(fake.sum()),), generator=noise)
        with torch.no_grad():
            rows[fake] = generator(torch.randn(int(fake.sum()), CODE, generator=noise), wanted[fake])
        return lambda: F.binary_cross_entropy_with_logits(discriminator(rows, wanted), (~fake).float(), reduction="none")

    return losses


def generator_step(generator: nn.Module, discriminator: nn.Module, task: Task) -> Callable[[int], None]:
    """What follows each step of the discriminator: every fifth time one of the generator, which is post-processing."""
    noise = torch.Generator().manual_seed(task.seed)
    optimizer = torch.optim.Adam(generator.parameters(), LEARNING_RATE, betas=BETAS)

    def after_step(step: int) -> None:
        if step % STEPS_TO_ONE != STEPS_TO_ONE - 1:
            return
        labels = torch.randint(task.classes, (BATCH,), generator=noise)
        logits = discriminator(generator(torch.randn(BATCH, CODE, generator=noise), labels), labels)
        optimizer.zero_grad()
        F.softplus(-logits).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return after_step
