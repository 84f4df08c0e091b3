"""Exponential moving average of weights: post-processing, free of privacy cost."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """Average of a module's parameters; young averages follow faster, as min(decay, (1 + t) / (10 + t))."""

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.average = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's present weights."""
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, parameter in module.named_parameters():
            self.average[name].lerp_(parameter.detach(), weight)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into the module."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.average[name])

    def restore(self, average: Mapping[str, Tensor], *, steps: int) -> None:
        """Go on from a checkpoint."""
        self.average = {name: average[name].clone() for name in self.average}
        self.steps = steps
