"""What the baselines share: the task, its booked mechanisms, and one loop of DP-SGD over patients."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from dpsynth.data.cohort import Float32, ImageSet, Int64
from dpsynth.model.ema import Ema
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.calibrate import calibrate_moments, calibrate_noise, gaussian_noise_multiplier
from dpsynth.privacy.mechanism import GaussianQuery, Mechanism, MomentRelease, PoissonDpSgd
from dpsynth.privacy.noise import NoiseStream
from dpsynth.train.dpsgd import private_mean, write_gradient
from dpsynth.train.gradients import PatientGradients, clipped_sum
from dpsynth.train.loop import images_in_turn
from dpsynth.train.poisson import poisson_batch

COUNT = 1500  # images that each method draws
CHUNK = 128  # rows per forward pass


@dataclass(frozen=True, kw_only=True)
class Task:
    """Private images and what is public about them. steps: of DP-SGD, or of the generator where the method has none."""

    training: ImageSet
    public: Float32  # (n, channel, *space), for constants
    epsilon: float
    delta: float
    declared_patients: int
    seed: int
    steps: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image: (channel, *space)."""
        return self.public.shape[1:]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.training.classes)

    def stream(self) -> NoiseStream:
        """Random numbers that repeat with the seed: right for an experiment on open data, wrong for a release."""
        return NoiseStream(key=hashlib.sha256(f"baseline {self.seed}".encode()).digest())


@dataclass(frozen=True, kw_only=True)
class Made:
    """Images (n, channel, *space) in [-1, 1] with labels (n,), what they spent, and CPU seconds by stage."""

    images: Float32
    labels: Int64
    mechanisms: tuple[Mechanism, ...]
    seconds: dict[str, float]


@dataclass
class Clock:
    """CPU seconds of this process, by stage."""

    seconds: dict[str, float] = field(default_factory=lambda: {"training": 0.0, "rest": 0.0})

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a block to the stage."""
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start


def one_release(task: Task, *, clip_norm: float, share: float = 1.0) -> MomentRelease:
    """One Gaussian sum over patients that spends `share` of mu^2."""
    noise = gaussian_noise_multiplier(task.epsilon, task.delta) / np.sqrt(share)
    queries = (GaussianQuery(name="sum", share=1.0, clip_norm=clip_norm),)
    noise = calibrate_moments(noise, queries, epsilon=task.epsilon, delta=task.delta) if share == 1 else noise
    return MomentRelease(noise_multiplier=float(noise), queries=queries)


def booked_sgd(task: Task, *, sampling_probability: float, clip_norm: float, before: tuple[Mechanism, ...] = ()) -> PoissonDpSgd:
    """DP-SGD of the task's steps that, composed with what was spent `before`, costs at most epsilon."""

    def make(noise: float) -> PoissonDpSgd:
        return PoissonDpSgd(
            noise_multiplier=noise,
            clip_norm=clip_norm,
            sampling_probability=sampling_probability,
            steps=task.steps,
            declared_patients=task.declared_patients,
        )

    return make(calibrate_noise(lambda noise: (*before, make(noise)), epsilon=task.epsilon, delta=task.delta))


def noised_sum(total: Float32 | np.ndarray, release: MomentRelease, stream: NoiseStream) -> np.ndarray:
    """The sum with the release's noise on every coordinate."""
    return np.asarray(total + release.noise_stddev("sum") * stream.normal("sum", 0, total.size).reshape(total.shape))


Losses = Callable[[Int64, torch.Generator], Callable[[], Tensor]]  # numbers of images (rows,) to a function that gives a loss a row
Gradients = Callable[[Callable[[], Tensor]], list[Tensor]]


def private_steps(
    net: nn.Module,
    task: Task,
    mechanism: PoissonDpSgd,
    losses: Losses,
    *,
    rows: int,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None = None,
    gradients: Gradients | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """DP-SGD in place: Poisson-drawn patients, each with the mean gradient of `rows` rows, clipped; noise; the public batch size.

    `gradients` computes the per-patient gradients, by default this project's engine. An empty batch is a step of noise.
    """
    stream, rows_of = task.stream(), task.training.rows_of()
    engine = None if gradients else PatientGradients(net, rows_per_patient=rows)
    per_patient = gradients or (engine.per_patient if engine else None)
    assert per_patient is not None
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for step in range(mechanism.steps):
        chosen = poisson_batch(stream, step=step, probability=mechanism.sampling_probability, num_patients=task.training.num_patients)
        generator = torch.Generator().manual_seed(int(stream.integers("rows", step, 1)[0]) % 2**63)
        total = torch.zeros(sum(parameter.numel() for parameter in parameters))
        for start in range(0, len(chosen), CHUNK // rows):
            patients = chosen[start : start + CHUNK // rows]
            first = torch.randint(2**31, (len(patients),), generator=generator).tolist()
            index = images_in_turn(rows_of, patients, first, rows)
            total += clipped_sum(per_patient(losses(index, generator)), clip_norm=mechanism.clip_norm)[0]
        write_gradient(parameters, private_mean(total, mechanism=mechanism, stream=stream, step=step))
        optimizer.step()
        if ema is not None:
            ema.update(net)
        if after_step is not None:
            after_step(step)
    if engine is not None:
        engine.close()
    if ema is not None:
        ema.copy_to(net)


def ema_for(net: nn.Module, steps: int) -> Ema:
    """The average over about the last fifth of the steps: 0.999 of the papers is for tens of thousands."""
    return Ema(net, decay=max(0.0, 1 - 5 / max(steps, 1)))


def labels_like(frequencies: np.ndarray, count: int = COUNT) -> Int64:
    """Labels (count,) in the given frequencies (classes,), which must have been released or be public."""
    shares = np.maximum(frequencies, 1e-3 * np.sum(frequencies))
    bounds = np.rint(np.cumsum(shares) / shares.sum() * count).astype(int)
    return np.searchsorted(bounds, np.arange(count), side="right").astype(np.int64)


def spent(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """Epsilon of the mechanisms together."""
    return epsilon_pld(mechanisms, delta)
