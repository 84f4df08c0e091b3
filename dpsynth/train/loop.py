"""DP-SGD on the denoiser: a thin loop in which every number comes from the booked mechanism and every random draw from the run's stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpsynth.config import LARGEST_SIGMA, DiffusionConfig
from dpsynth.data.cohort import ImageSet, Int64
from dpsynth.model.denoiser import Denoiser, noise_levels, stratified_normal
from dpsynth.model.ema import Ema
from dpsynth.privacy.audit import outcome
from dpsynth.privacy.mechanism import PoissonDpSgd
from dpsynth.privacy.noise import NoiseStream
from dpsynth.train.canaries import NUMBER, Canaries
from dpsynth.train.checkpoint import load_checkpoint, save_checkpoint
from dpsynth.train.dpsgd import ENGINE, Engine, clipped_total, write_gradient
from dpsynth.train.gradients import PatientGradients
from dpsynth.train.monitor import Monitor

SMALLEST_SIGMA = 0.05  # below this noise level a denoiser only cleans; the public net knows that already


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Training rows of some patients, `draws` each, next to each other."""

    clean: Tensor
    labels: Tensor
    sigma: Tensor
    noise: Tensor


def fit(
    denoiser: Denoiser,
    training: ImageSet,
    mechanism: PoissonDpSgd,
    settings: DiffusionConfig,
    *,
    stream: NoiseStream,
    checkpoint: Path,
    binding: str,
    callback: Callable[[int], None],
    engine: Engine = ENGINE,
) -> Monitor:
    """Train in place, from the checkpoint when there is one; afterwards the denoiser holds the averaged weights."""
    denoiser.set_trainable(settings.trainable)
    denoiser.train()
    gradients = engine.gradients(denoiser.net, rows_per_patient=settings.draws)
    optimizer = torch.optim.Adam(gradients.parameters, settings.learning_rate, betas=(0.9, 0.99))
    ema = Ema(denoiser.net, decay=settings.ema_decay)
    done, monitor = load_checkpoint(checkpoint, net=denoiser.net, ema=ema, optimizer=optimizer, binding=binding)
    rows_of, patients = training.rows_of(), training.num_patients
    canaries = Canaries.drawn(stream, scores=monitor.canary_scores, number=NUMBER)
    for step in range(done, mechanism.steps):
        drawn = engine.sample(stream, step=step, probability=mechanism.sampling_probability, num_patients=patients + len(canaries.inside))
        chosen = drawn[drawn < patients]
        total, contribution = _clipped_total(denoiser, gradients, training, rows_of, chosen, mechanism, settings, stream, step, engine)
        planted = canaries.total(drawn[drawn >= patients] - patients, clip_norm=mechanism.clip_norm, engine=engine)
        noised = engine.noise(torch.cat([total, planted]), mechanism=mechanism, stream=stream, step=step)
        mean = noised[: len(total)]  # the canaries' coordinates belong to no weight
        canaries.record(noised[len(total) :], mechanism)
        monitor.canary_scores = canaries.scores.tolist()
        monitor.record(batch_size=len(chosen), contribution=contribution, total=total, mean=mean, mechanism=mechanism)
        write_gradient(gradients.parameters, mean)
        optimizer.step()
        ema.update(denoiser.net)
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == mechanism.steps:
            save_checkpoint(checkpoint, step=step + 1, net=denoiser.net, ema=ema, optimizer=optimizer, monitor=monitor, binding=binding)
        callback(step + 1)
    gradients.close()
    monitor.canaries = outcome(canaries.scores, canaries.inside, mechanism)
    ema.copy_to(denoiser.net)
    return monitor


def _clipped_total(
    denoiser: Denoiser,
    gradients: PatientGradients,
    training: ImageSet,
    rows_of: list[Int64],
    chosen: Int64,
    mechanism: PoissonDpSgd,
    settings: DiffusionConfig,
    stream: NoiseStream,
    step: int,
    engine: Engine,
) -> tuple[Tensor, float]:
    """Clipped sum over the chosen patients and the largest contribution."""
    if not len(chosen):
        return torch.zeros(sum(parameter.numel() for parameter in gradients.parameters)), 0.0
    rows = draw_rows(training, rows_of, chosen, draws=settings.draws, stream=stream, step=step)

    def losses(part: slice) -> Tensor:
        return denoiser.row_losses(rows.clean[part], rows.labels[part], sigma=rows.sigma[part], noise=rows.noise[part])

    return clipped_total(
        gradients,
        losses,
        rows=len(rows.clean),
        rows_per_chunk=settings.patients_per_chunk * settings.draws,
        clip_norm=mechanism.clip_norm,
        engine=engine,
    )


def draw_rows(training: ImageSet, rows_of: list[Int64], chosen: Int64, *, draws: int, stream: NoiseStream, step: int) -> Rows:
    """`draws` rows for each chosen patient: their images in turn from a random first one, with noise levels that are spread."""
    seed = int(stream.integers("rows", step, 1)[0])
    rng = np.random.default_rng(seed)
    index = images_in_turn(rows_of, chosen, [int(rng.integers(len(rows_of[int(patient)]))) for patient in chosen], draws)
    clean = torch.from_numpy(training.images[index])
    generator = torch.Generator().manual_seed(seed % 2**63)
    normal, largest = stratified_normal(len(chosen), draws, generator), LARGEST_SIGMA[clean.ndim - 2]
    sigma = noise_levels(normal, smallest=SMALLEST_SIGMA, largest=largest)
    noise = torch.randn(clean.shape, generator=generator)
    return Rows(clean=clean, labels=torch.from_numpy(training.labels[index]), sigma=sigma, noise=noise)


def images_in_turn(rows_of: list[Int64], chosen: Int64, first: list[int], count: int) -> Int64:
    """`count` image numbers for each chosen patient, next to each other: their images in turn, beginning with the `first` of each."""
    images = [rows_of[int(patient)] for patient in chosen]
    return np.concatenate([own[(start + np.arange(count)) % len(own)] for own, start in zip(images, first, strict=True)])
