"""Per-patient gradients through Opacus' hooks, with grad samplers of our own.

Why own samplers: Opacus' one for Conv2d is wrong for activations that are not contiguous in memory (channels_last), and none knows that
several rows belong to one patient. Ours fold the rows of a patient inside the layer: a convolution's gradient for B patients of K
rows is one grouped `convolution_backward` with the patients as groups and their rows as the batch (no im2col), so memory holds B
gradients, not B*K. They are held by a subclass, so Opacus' global registry stays as it is.
A row's loss is weighted 1/K, so that a patient's gradient is the mean over their rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from dpsynth.errors import SelfCheckFailed

Sampler = Callable[[nn.Module, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]


def _units(module: nn.Module, rows: int) -> tuple[int, int]:
    per_patient = int(getattr(module, "rows_per_patient", 1))
    if rows % per_patient:
        raise ValueError(f"Expected a multiple of {per_patient} rows, got {rows}.")
    # Opacus pads what a sampler returns up to this length; one gradient per patient is already complete.
    module.max_batch_len = rows // per_patient  # type: ignore[assignment]
    return rows // per_patient, per_patient


def _fold(rows: Tensor, patients: int) -> Tensor:
    """Sum the rows of each patient: (patients * k, *) to (patients, *)."""
    return rows.reshape(patients, -1, *rows.shape[1:]).sum(1)


def _wanted(module: nn.Module, gradients: dict[str, Callable[[], Tensor]]) -> dict[nn.Parameter, Tensor]:
    found: dict[nn.Parameter, Tensor] = {}
    for name, make in gradients.items():
        parameter = getattr(module, name, None)
        if parameter is not None and parameter.requires_grad:
            found[parameter] = make()
    return found


def _convolution(module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    x, g = activations[0].contiguous(), backprops.contiguous()
    patients, k = _units(module, len(g))

    def group(t: Tensor) -> Tensor:
        t = t.reshape(patients, k, *t.shape[1:]).transpose(0, 1)
        return t.reshape(k, patients * t.shape[2], *t.shape[3:]).contiguous()

    def weight() -> Tensor:
        stacked = module.weight.detach().repeat(patients, *(1 for _ in module.weight.shape[1:]))
        gradient = torch.ops.aten.convolution_backward(
            group(g), group(x), stacked, None, module.stride, module.padding, module.dilation,
            False, [0] * (x.dim() - 2), patients * module.groups, [False, True, False],
        )[1]  # fmt: skip
        return torch.as_tensor(gradient).reshape(patients, *module.weight.shape)

    return _wanted(module, {"weight": weight, "bias": lambda: _fold(g.flatten(2).sum(2), patients)})


def _linear(module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    patients, _ = _units(module, len(backprops))
    g = backprops.reshape(patients, -1, backprops.shape[-1])
    x = activations[0].reshape(patients, -1, activations[0].shape[-1])
    return _wanted(module, {"weight": lambda: torch.bmm(g.transpose(1, 2), x), "bias": lambda: g.sum(1)})


def _group_norm(module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    assert isinstance(module, nn.GroupNorm)
    patients, _ = _units(module, len(backprops))

    def weight() -> Tensor:
        normalised = F.group_norm(activations[0], module.num_groups, eps=module.eps)
        return _fold((normalised * backprops).flatten(2).sum(2), patients)

    return _wanted(module, {"weight": weight, "bias": lambda: _fold(backprops.flatten(2).sum(2), patients)})


def _layer_norm(module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    assert isinstance(module, nn.LayerNorm)
    patients, _ = _units(module, len(backprops))
    inner = len(module.normalized_shape)

    def total(rows: Tensor) -> Tensor:
        return rows.reshape(patients, -1, *rows.shape[-inner:]).sum(1)

    def weight() -> Tensor:
        return total(F.layer_norm(activations[0], module.normalized_shape, eps=module.eps) * backprops)

    return _wanted(module, {"weight": weight, "bias": lambda: total(backprops)})


def _embedding(module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    assert isinstance(module, nn.Embedding)
    patients, _ = _units(module, len(backprops))
    g = backprops.reshape(patients, -1, backprops.shape[-1])
    index = activations[0].reshape(patients, -1, 1).expand_as(g)

    def weight() -> Tensor:
        return g.new_zeros(patients, *module.weight.shape).scatter_add_(1, index, g)

    return _wanted(module, {"weight": weight})


class PatientGradSampleModule(GradSampleModule):  # type: ignore[misc]
    """Opacus' module with our samplers; `rows_per_patient` rows of a patient lie next to each other in every batch."""

    GRAD_SAMPLERS: dict[type[nn.Module], Sampler] = {  # noqa: RUF012 (the name and the kind are Opacus')
        nn.Conv1d: _convolution,
        nn.Conv2d: _convolution,
        nn.Conv3d: _convolution,
        nn.Linear: _linear,
        nn.GroupNorm: _group_norm,
        nn.LayerNorm: _layer_norm,
        nn.Embedding: _embedding,
    }

    def __init__(self, module: nn.Module, *, rows_per_patient: int) -> None:
        for name, layer in module.named_modules():
            _require_known(name, layer, self.GRAD_SAMPLERS)
            layer.rows_per_patient = rows_per_patient
        super().__init__(module, batch_first=True, loss_reduction="sum", strict=False)


def _require_known(name: str, layer: nn.Module, samplers: dict[type[nn.Module], Sampler]) -> None:
    own = [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]
    if own and type(layer) not in samplers:
        raise SelfCheckFailed(
            f"all_parameters_covered: no per-patient gradient is known for {type(layer).__name__} ({name}). Freeze or replace it."
        )
    is_convolution = bool(own) and isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if is_convolution and (isinstance(layer.padding, str) or layer.padding_mode != "zeros" or layer.transposed):
        raise SelfCheckFailed(f"all_parameters_covered: convolution {name} uses padding that has no per-patient gradient.")


class PatientGradients:
    """Clipped sums of per-patient gradients of `module`'s trainable parameters."""

    def __init__(self, module: nn.Module, *, rows_per_patient: int, hooks: type[GradSampleModule] | None = None) -> None:
        self.rows_per_patient = rows_per_patient
        if hooks is None:
            self.hooked: GradSampleModule = PatientGradSampleModule(module, rows_per_patient=rows_per_patient)
        else:  # tests compare with other engines
            self.hooked = hooks(module, loss_reduction="sum", strict=False)
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def per_patient(self, row_losses: Callable[[], Tensor]) -> list[Tensor]:
        """One gradient per patient and parameter, [(patients, *shape)]. `row_losses` returns one loss per row."""
        self.hooked.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            # The first layer's input needs no gradient; the hook still sees its output's gradient, which is all a grad sampler uses.
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            (row_losses().sum() / self.rows_per_patient).backward()  # type: ignore[no-untyped-call]
        gradients = []
        for parameter in self.parameters:
            sample = getattr(parameter, "grad_sample", None)
            if not isinstance(sample, Tensor):
                raise SelfCheckFailed("all_parameters_covered: a trainable parameter got no per-patient gradient, or several. Freeze it.")
            gradients.append(sample)
            parameter.grad_sample = None  # type: ignore[attr-defined]
        self.hooked.zero_grad(set_to_none=True)
        return gradients

    def close(self) -> None:
        """Take Opacus' hooks off the module."""
        self.hooked.to_standard_module()


def clipped_sum(gradients: list[Tensor], *, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Clip each patient's gradient to `clip_norm` and add them up: (total length,), and each patient's norm after the clip.

    A gradient whose norm is not finite becomes zero, so one broken image can neither stop nor spoil a step.
    """
    flat = torch.cat([gradient.flatten(1).float() for gradient in gradients], dim=1)
    norms = flat.norm(dim=1)
    usable = torch.isfinite(norms)  # also false when the squares of finite numbers overflow
    flat, norms = torch.where(usable[:, None], flat, 0.0), torch.where(usable, norms, 0.0)
    factor = (clip_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    return flat.T @ factor, norms * factor
