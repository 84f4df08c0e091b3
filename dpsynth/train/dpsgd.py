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
