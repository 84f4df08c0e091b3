"""Per-patient gradients: what autograd would throw away, kept by patient.

While the net runs forward its trainable parameters ask for no gradient, so autograd never forms the batch's weight gradient, the part of
a step that Opacus computes and discards. A hook on each layer's output receives the gradient there and hands it, with the layer's input,
to a grad sampler of the kind that Opacus registers: our own for the layers that matter, Opacus' functorch one for any other. Ours fold the
rows of a patient inside the layer (a convolution's gradient for B patients of K rows is one grouped `convolution_backward` with the
patients as groups and their rows as the batch, no im2col), so memory holds B gradients, not B*K, and they do not depend on the memory
layout, as Opacus' one for Conv2d does.
A row's loss is weighted 1/K, so that a patient's gradient is the mean over their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient, prepare_layer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dpsynth.errors import SelfCheckFailed

Sampler = Callable[[nn.Module, Tensor, Tensor, int], dict[nn.Parameter, Tensor]]  # layer, its input, gradient at its output, patients


def _fold(rows: Tensor, patients: int) -> Tensor:
    """Sum the rows of each patient: (patients * k, *) to (patients, *)."""
    return rows if len(rows) == patients else rows.reshape(patients, -1, *rows.shape[1:]).sum(1)


def _wanted(module: nn.Module, gradients: dict[str, Callable[[], Tensor]]) -> dict[nn.Parameter, Tensor]:
    found: dict[nn.Parameter, Tensor] = {}
    for name, make in gradients.items():
        parameter = getattr(module, name, None)
        if parameter is not None and parameter.requires_grad:
            found[parameter] = make()
    return found


def _convolution(module: nn.Module, x: Tensor, g: Tensor, patients: int) -> dict[nn.Parameter, Tensor]:
    assert isinstance(module, _Convolution)
    unroll = isinstance(module, nn.Conv2d) and module.groups == 1 and g[0, 0].numel() <= _FEW_POSITIONS
    weight = _unrolled if unroll else _grouped
    return _wanted(module, {"weight": lambda: weight(module, x, g, patients), "bias": lambda: _fold(g.flatten(2).sum(2), patients)})


def _grouped(module: Any, x: Tensor, g: Tensor, patients: int) -> Tensor:
    """One convolution whose groups are the patients and whose batch is their rows: nothing is unrolled."""

    def group(rows: Tensor) -> Tensor:
        k = len(rows) // patients
        rows = rows.reshape(patients, k, *rows.shape[1:]).transpose(0, 1)
        return rows.reshape(k, patients * rows.shape[2], *rows.shape[3:]).contiguous()

    shape = module.weight.shape
    weights = g.new_empty(patients * shape[0], *shape[1:])  # only its shape is read for the gradient of the weights
    gradient = torch.ops.aten.convolution_backward(
        group(g), group(x), weights, None, module.stride, module.padding, module.dilation,
        module.transposed, module.output_padding, patients * module.groups, [False, True, False],
    )[1]  # fmt: skip
    return torch.as_tensor(gradient).reshape(patients, *shape)


def _unrolled(module: Any, x: Tensor, g: Tensor, patients: int) -> Tensor:
    """The windows written out with channels last, then one matrix product a patient: up to four times faster on few positions."""
    (top, left), (rise, step), (down, right) = module.padding, module.stride, module.dilation
    _, channels, *kernel = module.weight.shape
    height, width = g.shape[2:]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top)).contiguous()
    n, h, w, c = padded.stride()
    windows = padded.as_strided((len(x), height, width, *kernel, channels), (n, h * rise, w * step, h * down, w * right, c))
    by_patient = windows.reshape(patients, -1, channels * kernel[0] * kernel[1])
    g = g.reshape(patients, -1, *g.shape[1:]).transpose(1, 2).reshape(patients, g.shape[1], -1)
    return torch.bmm(g, by_patient).reshape(patients, -1, *kernel, channels).permute(0, 1, 4, 2, 3)


def _linear(module: nn.Module, x: Tensor, g: Tensor, patients: int) -> dict[nn.Parameter, Tensor]:
    g, x = g.reshape(patients, -1, g.shape[-1]), x.reshape(patients, -1, x.shape[-1])
    return _wanted(module, {"weight": lambda: torch.bmm(g.transpose(1, 2), x), "bias": lambda: g.sum(1)})


def _group_norm(module: nn.Module, x: Tensor, g: Tensor, patients: int) -> dict[nn.Parameter, Tensor]:
    assert isinstance(module, nn.GroupNorm)

    def weight() -> Tensor:
        normalised = F.group_norm(x, module.num_groups, eps=module.eps)
        return _fold((normalised * g).flatten(2).sum(2), patients)

    return _wanted(module, {"weight": weight, "bias": lambda: _fold(g.flatten(2).sum(2), patients)})


def _layer_norm(module: nn.Module, x: Tensor, g: Tensor, patients: int) -> dict[nn.Parameter, Tensor]:
    assert isinstance(module, nn.LayerNorm)
    inner = len(module.normalized_shape)

    def total(rows: Tensor) -> Tensor:
        return rows.reshape(patients, -1, *rows.shape[-inner:]).sum(1)

    return _wanted(
        module, {"weight": lambda: total(F.layer_norm(x, module.normalized_shape, eps=module.eps) * g), "bias": lambda: total(g)}
    )


def _embedding(module: nn.Module, x: Tensor, g: Tensor, patients: int) -> dict[nn.Parameter, Tensor]:
    assert isinstance(module, nn.Embedding)
    g = g.reshape(patients, -1, g.shape[-1])
    index = x.reshape(patients, -1, 1).expand_as(g)

    def weight() -> Tensor:
        gradient = g.new_zeros(patients, *module.weight.shape).scatter_add_(1, index, g)
        if module.padding_idx is not None:  # its vector does not learn
            gradient[:, module.padding_idx] = 0
        return gradient

    return _wanted(module, {"weight": weight})


_BLOCK = 2**16
_FEW_POSITIONS = 100  # measured: see experiments/002-engine-speed
_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_OWN: dict[type[nn.Module], Sampler] = {
    **dict.fromkeys(get_args(_Convolution), _convolution),
    nn.Linear: _linear,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}


def _by_opacus(module: nn.Module, x: Tensor, g: Tensor, patients: int) -> dict[nn.Parameter, Tensor]:
    """Opacus' way for any layer, functorch over its rows: slower; one gradient a row, folded here."""
    hooks, module._forward_hooks = module._forward_hooks, type(module._forward_hooks)()
    try:
        prepare_layer(module)  # each time: it works on a copy of the layer as it is now
    finally:
        module._forward_hooks = hooks  # the copy needs none
    found = ft_compute_per_sample_gradient(module, [x], g)
    del module.ft_compute_sample_grad
    return {parameter: _fold(rows, patients) for parameter, rows in found.items() if parameter.requires_grad}


def _sampler(name: str, layer: nn.Module) -> Sampler:
    """Who computes this layer's gradients; raises SelfCheckFailed when nobody can."""
    unusual = isinstance(layer, _Convolution) and (isinstance(layer.padding, str) or layer.padding_mode != "zeros")
    mixes = isinstance(layer, _BatchNorm) or (isinstance(layer, nn.Embedding) and layer.scale_grad_by_freq)
    if type(layer) in _OWN and not unusual and not mixes:
        return _OWN[type(layer)]
    if mixes or any(True for _ in layer.children()) or any(True for _ in layer.buffers(recurse=False)):
        raise SelfCheckFailed(
            f"all_parameters_covered: no per-patient gradient is known for {type(layer).__name__} ({name or 'the net itself'}): it has "
            "parameters beside inner layers or buffers, or mixes patients. Freeze or replace it."
        )
    return _by_opacus


class PatientGradients:
    """Gradients of `module`'s trainable parameters by patient, whose rows (`rows_per_patient`) lie next to each other in every batch."""

    def __init__(self, module: nn.Module, *, rows_per_patient: int) -> None:
        self.rows_per_patient = rows_per_patient
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._recording = False
        layers = {name: layer for name, layer in module.named_modules() if any(p.requires_grad for p in layer.parameters(recurse=False))}
        samplers = {layer: _sampler(name, layer) for name, layer in layers.items()}
        self.by_opacus = tuple(sorted({type(layer).__name__ for layer, sampler in samplers.items() if sampler is _by_opacus}))
        self._hooks = [layer.register_forward_hook(partial(self._record, sampler)) for layer, sampler in samplers.items()]

    def per_patient(self, row_losses: Callable[[], Tensor], *, weights: Tensor | None = None) -> list[Tensor]:
        """One float32 gradient per patient and parameter, [(patients, *shape)]. `row_losses` runs the net and returns one loss per row.

        `weights` (rows,) are 1/K by default; a patient of fewer rows fills up with rows of weight zero.
        """
        self._gradients = {}
        with self._asking_for_no_gradient():
            losses = row_losses()
        ((losses * weights).sum() if weights is not None else losses.sum() / self.rows_per_patient).backward()  # type: ignore[no-untyped-call]
        if len(self._gradients) < len(self.parameters):
            raise SelfCheckFailed("all_parameters_covered: a trainable parameter got no per-patient gradient. Freeze it.")
        found, self._gradients = [self._gradients[parameter] for parameter in self.parameters], {}
        return found

    @contextmanager
    def _asking_for_no_gradient(self) -> Iterator[None]:
        try:
            self._recording = True
            for parameter in self.parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            self._recording = False
            for parameter in self.parameters:
                parameter.requires_grad_(True)

    def _record(self, sampler: Sampler, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook: keep the layer's input, and wait at its output for the gradient."""
        if not (self._recording and torch.is_grad_enabled()):
            return None
        if len(inputs) != 1:
            raise SelfCheckFailed(f"all_parameters_covered: {type(layer).__name__} takes {len(inputs)} inputs; expected one, by position.")
        x, version = inputs[0].detach(), inputs[0]._version
        first = not output.requires_grad  # nothing before it needs a gradient
        if first:
            output.requires_grad_()

        def receive(g: Tensor) -> None:
            if x._version != version:
                raise SelfCheckFailed(
                    f"gradients_exact: the input of a {type(layer).__name__} was changed in place after its forward pass."
                )
            patients, rest = divmod(len(g), self.rows_per_patient)
            if rest:
                raise ValueError(f"Expected a multiple of {self.rows_per_patient} rows, got {len(g)}.")
            typed = x.to(g.dtype) if x.is_floating_point() else x  # under autocast the layer saw it so
            for parameter, gradient in sampler(layer, typed, g, patients).items():
                gradient = gradient.float()
                known = self._gradients.get(parameter)
                self._gradients[parameter] = gradient if known is None else known + gradient

        output.register_hook(receive)  # type: ignore[no-untyped-call]
        return output.clone() if first else None  # code that works in place must not meet a leaf

    def close(self) -> None:
        """Take the hooks off the module."""
        for hook in self._hooks:
            hook.remove()


_LONGEST = 1e30  # times the clip norm: float32 keeps ever fewer digits of factors below 1e-38, and one rounded up breaks the bound


def clipped_sum(gradients: list[Tensor], *, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Clip each patient's gradient to `clip_norm` and add them up: (total length,), and each patient's norm after the clip.

    A gradient whose norm is not finite, or so long that clipping it would be inexact, becomes zero, so one image can neither stop nor
    spoil a step.
    """
    norms = _norms(gradients)
    usable = torch.isfinite(norms) & (norms.double() <= clip_norm * _LONGEST)  # also false when the squares of finite numbers overflow
    if not bool(usable.all()):
        gradients = [torch.where(usable.view(-1, *(1 for _ in gradient.shape[1:])), gradient, 0.0) for gradient in gradients]
        norms = torch.where(usable, norms, 0.0)
    factor = (clip_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    return torch.cat([_weighted_sum(gradient, factor).flatten() for gradient in gradients]), norms * factor


def _norms(gradients: list[Tensor]) -> Tensor:
    """Norm of each patient's gradient (patients,). In blocks added up in float64: float32 alone loses 1 % over ten million numbers."""
    blocks = [block.norm(dim=1) for gradient in gradients for block in torch.split(_flat(gradient), _BLOCK, dim=1)]
    total: Tensor = torch.stack(blocks).double().norm(dim=0)
    return total.float()


def _memory_order(gradient: Tensor) -> list[int]:
    strides = gradient.stride()
    return sorted(range(1, gradient.dim()), key=lambda axis: -strides[axis])


def _flat(gradient: Tensor) -> Tensor:
    """(patients, numbers of one) in the order of memory, which spares a copy."""
    return gradient.permute(0, *_memory_order(gradient)).flatten(1)


def _weighted_sum(gradient: Tensor, factor: Tensor) -> Tensor:
    order = _memory_order(gradient)
    total = (factor @ _flat(gradient)).view([gradient.shape[axis] for axis in order])
    return total.permute([order.index(axis) for axis in range(1, gradient.dim())])
