"""One step of DP-SGD as four replaceable parts, so that the self-check examines exactly what training uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpsynth.data.cohort import Int64
from dpsynth.privacy.mechanism import PoissonDpSgd
from dpsynth.privacy.noise import NoiseStream
from dpsynth.train.gradients import PatientGradients, clipped_sum
from dpsynth.train.poisson import poisson_batch


def private_mean(total: Tensor, *, mechanism: PoissonDpSgd, stream: NoiseStream, step: int) -> Tensor:
    """Add the mechanism's noise to a clipped sum (length,) and divide by the expected batch size; float64."""
    noise = torch.from_numpy(stream.normal("gradient", step, len(total)))
    return (total.double() + mechanism.noise_stddev * noise) / mechanism.expected_batch_size


def clipped_total(
    gradients: PatientGradients, row_losses: Callable[[slice], Tensor], *, rows: int, rows_per_chunk: int, clip_norm: float, engine: Engine
) -> tuple[Tensor, float]:
    """Clipped sum over the patients of `rows` rows (total length,), in chunks, and the largest contribution. No rows are a zero sum.

    `row_losses` gives the losses of a slice of the rows; a chunk holds whole patients.
    """
    total = torch.zeros(sum(parameter.numel() for parameter in gradients.parameters))
    largest = 0.0
    for start in range(0, rows, rows_per_chunk):
        part = slice(start, min(start + rows_per_chunk, rows))
        clipped, norms = engine.clip(gradients.per_patient(lambda part=part: row_losses(part)), clip_norm=clip_norm)  # type: ignore[misc]
        total += clipped
        largest = max(largest, float(norms.max()))
    return total, largest


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Sampler, per-patient gradients, clip and noise of DP-SGD. Anything but the defaults exists only to show that the checks catch it."""

    sample: Callable[..., Int64] = poisson_batch
    gradients: Callable[..., PatientGradients] = PatientGradients
    clip: Callable[..., tuple[Tensor, Tensor]] = clipped_sum
    noise: Callable[..., Tensor] = private_mean


ENGINE = Engine()


def write_gradient(parameters: list[torch.nn.Parameter], mean: Tensor) -> None:
    """Cut a flat gradient (length,) into the parameters' `.grad`."""
    offset = 0
    for parameter in parameters:
        part = mean[offset : offset + parameter.numel()]
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
        offset += parameter.numel()
