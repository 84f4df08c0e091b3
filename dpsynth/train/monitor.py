"""What was really added to the data's sums; tested before anything is finished. Batch sizes are private: this stays at the site."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from dpsynth.privacy.audit import Audit
from dpsynth.privacy.mechanism import MomentRelease, PoissonDpSgd
from dpsynth.train.selfcheck import FALSE_ALARM, Finding, dispersion_p, noise_finding


@dataclass(kw_only=True)
class MomentMonitor:
    """The noise of each query of the moments, in units of the booked standard deviation: (classes, width) by name."""

    mechanism: MomentRelease
    noise: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def record(self, name: str, total: NDArray[np.float64], noised: NDArray[np.float64]) -> None:
        """Note one query: the exact sums that went in and the noised sums that came out."""
        self.noise[name] = (noised - total) / self.mechanism.noise_stddev(name)

    def findings(self) -> dict[str, Finding]:
        """Every class of every query has noise of the booked scale, and none of it is used twice."""
        missing = [query.name for query in self.mechanism.queries if query.name not in self.noise]
        if missing:
            detail = f"no noise was seen on {', '.join(missing)}"
            return {"moments_noise": Finding(ok=False, detail=detail, statistic=0.0, threshold=FALSE_ALARM)}
        blocks = [(f"{name}, class {label}", row) for name, rows in self.noise.items() for label, row in enumerate(rows)]
        tests = {name: noise_finding(float(np.sum(row**2)), row.size) for name, row in blocks}
        worst = min(tests, key=lambda name: tests[name].statistic)
        p = min(1.0, tests[worst].statistic * len(tests))  # Bonferroni over the blocks
        # To nine digits millions of different numbers are different, and one number on two sums is the same.
        numbers = np.round(np.concatenate([row for _, row in blocks]), 9)
        repeated = 1 - len(np.unique(numbers)) / numbers.size
        detail = f"{worst}: {tests[worst].detail}; {repeated:.2%} of all noise numbers occur twice"
        return {"moments_noise": Finding(ok=p >= FALSE_ALARM and repeated < 0.2, detail=detail, statistic=p, threshold=FALSE_ALARM)}


@dataclass(kw_only=True)
class Monitor:
    """Batch sizes, largest contribution and noise energy of the steps so far."""

    batch_sizes: list[int] = field(default_factory=list)
    largest_contribution: float = 0.0
    noise_energy: float = 0.0
    noise_numbers: int = 0
    canary_scores: list[float] = field(default_factory=list)  # so far; kept for a run that is killed and goes on
    canaries: Audit | None = None  # their outcome, once training is over

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
        total = stats.binomtest(int(sizes.sum()), num_patients * len(sizes), q).pvalue if len(sizes) else 1.0
        spread = 1.0 if q >= 1 else min(1.0, 2 * min(float(total), dispersion_p(sizes, num_patients, q)))
        worst = self.largest_contribution / mechanism.clip_norm
        return {
            "live_contribution_bounded": Finding(
                ok=worst <= 1 + 1e-4, detail=f"largest contribution {worst:.4f} clip norms", statistic=worst, threshold=1 + 1e-4
            ),
            "live_noise_scale": noise_finding(self.noise_energy, self.noise_numbers),
            "live_sampler_poisson": Finding(
                ok=spread >= FALSE_ALARM,
                detail=f"sum and scatter of batch sizes have p-value {spread:.2g}",
                statistic=spread,
                threshold=FALSE_ALARM,
            ),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values, for checkpoints."""
        return {name: value for name, value in self.__dict__.items() if name != "canaries"}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Monitor:
        """Inverse of `to_json`."""
        if not math.isfinite(value["noise_energy"]):
            raise ValueError("Expected finite noise energy.")
        return cls(**value)
