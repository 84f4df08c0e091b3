"""What the loop really did, step by step; tested before anything is finished. Batch sizes are private: this stays at the site."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpsynth.privacy.mechanism import PoissonDpSgd
from dpsynth.train.selfcheck import FALSE_ALARM, Finding, dispersion_p, noise_finding


@dataclass(kw_only=True)
class Monitor:
    """Batch sizes, largest contribution and noise energy of the steps so far."""

    batch_sizes: list[int] = field(default_factory=list)
    largest_contribution: float = 0.0
    noise_energy: float = 0.0
    noise_numbers: int = 0

    def record(self, *, batch_size: int, contribution: float, total: Tensor, mean: Tensor, mechanism: PoissonDpSgd) -> None:
        """Note one step: the clipped sum that went in and the noised mean that came out."""
        noise = mean.double() * mechanism.expected_batch_size - total.double()
        self.batch_sizes.append(batch_size)
        self.largest_contribution = max(self.largest_contribution, contribution)
        self.noise_energy += float(torch.sum(noise**2)) / mechanism.noise_stddev**2
        self.noise_numbers += len(noise)

    def findings(self, mechanism: PoissonDpSgd, num_patients: int) -> dict[str, Finding]:
        """The same three questions as before training, asked of what happened."""
        q = mechanism.sampling_probability
        sizes = np.array(self.batch_sizes, dtype=np.int64)
        spread = 1.0 if q >= 1 or len(sizes) < 10 else dispersion_p(sizes, num_patients, q)
        worst = self.largest_contribution / mechanism.clip_norm
        return {
            "live_contribution_bounded": Finding(
                ok=worst <= 1 + 1e-4, detail=f"largest contribution {worst:.4f} clip norms", statistic=worst, threshold=1 + 1e-4
            ),
            "live_noise_scale": noise_finding(self.noise_energy, self.noise_numbers),
            "live_sampler_poisson": Finding(
                ok=spread >= FALSE_ALARM,
                detail=f"batch sizes scatter with p-value {spread:.2g}",
                statistic=spread,
                threshold=FALSE_ALARM,
            ),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values, for checkpoints."""
        return {**self.__dict__}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Monitor:
        """Inverse of `to_json`."""
        if not math.isfinite(value["noise_energy"]):
            raise ValueError("Expected finite noise energy.")
        return cls(**value)
