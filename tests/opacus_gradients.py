"""Opacus' hooks as they are, behind the interface of our engine: the oracle where they are right, a known-bad engine where not."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn


class OpacusGradients:
    """One gradient per row; the rows of a patient are neither folded nor weighted but by 1/K."""

    def __init__(self, module: nn.Module, *, rows_per_patient: int) -> None:
        self.rows_per_patient, self.by_opacus = rows_per_patient, ("every layer",)
        self.hooked = GradSampleModule(module, loss_reduction="sum", strict=False)
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def per_patient(self, row_losses: Callable[[], Tensor]) -> list[Tensor]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            (row_losses().sum() / self.rows_per_patient).backward()
        found = [parameter.grad_sample for parameter in self.parameters]
        self.hooked.zero_grad(set_to_none=True)
        return found

    def close(self) -> None:
        self.hooked.to_standard_module()
