"""Per-patient gradients against the plain way: one patient at a time, by autograd, mean over their rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from monai.networks.nets import AutoencoderKL, ControlNet, DiffusionModelUNet, SPADEDiffusionModelUNet
from opacus.grad_sample import GradSampleModule
from opacus_gradients import OpacusGradients
from torch import Tensor, nn

from dpsynth.errors import SelfCheckFailed
from dpsynth.model.denoiser import Denoiser
from dpsynth.model.moments import Moments
from dpsynth.train.gradients import PatientGradients, clipped_sum

Loss = Callable[[nn.Module, Tensor], Tensor]


def one_at_a_time(net: nn.Module, loss: Loss, x: Tensor, rows: int) -> Tensor:
    """(patients, parameters): no engine, no hook, no batch."""
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    found = []
    for patient in torch.split(x, rows):
        gradient = torch.autograd.grad(loss(net, patient).mean(), parameters, allow_unused=True)
        found.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradient, strict=True)]))
    return torch.stack(found)


def by_engine(net: nn.Module, loss: Loss, x: Tensor, rows: int) -> Tensor:
    engine = PatientGradients(net, rows_per_patient=rows)
    gradients = engine.per_patient(lambda: loss(net, x))
    flat = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
    engine.close()
    return flat


def assert_exact(net: nn.Module, loss: Loss, x: Tensor, rows: int) -> None:
    expected = one_at_a_time(net, loss, x, rows)
    assert expected.norm() > 0
    found = by_engine(net, loss, x, rows)
    assert found.shape == expected.shape
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5


def squares(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A loss per row that no symmetry makes zero."""
    out = net(x).flatten(1)
    return (out * torch.linspace(0.5, 1.5, out.shape[1])).square().mean(1) + out.mean(1)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "convolution": (nn.Conv2d(3, 4, 3), (3, 9, 8)),
    "strided": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 9, 8)),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=2, bias=False), (3, 9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 7, 7)),
    "of one pixel": (nn.Conv2d(3, 4, 1), (3, 5, 6)),
    "in one dimension": (nn.Conv1d(3, 4, 3, padding=1), (3, 9)),
    "in three dimensions": (nn.Conv3d(2, 3, 3, stride=2, padding=1), (2, 5, 6, 7)),
    "linear": (nn.Linear(5, 4), (5,)),
    "linear over a sequence": (nn.Linear(5, 4, bias=False), (6, 5)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (3, 5, 6)),
    "transposed and grouped": (nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), (4, 5, 6)),
    "unrolled, uneven": (nn.Conv2d(3, 4, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (3, 9, 8)),
    "group norm": (nn.GroupNorm(2, 4), (4, 5, 6)),
    "layer norm": (nn.LayerNorm((4, 5)), (3, 4, 5)),
    "used twice": (nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1)] * 2), (3, 6, 6)),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, rows: int) -> None:
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    assert_exact(layer, squares, torch.randn(4 * rows, *shape), rows)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_memory_layout_does_not_matter(rows: int, transposed: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 2, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(4 * rows, 3, 8, 8)
    x = x.transpose(2, 3) if transposed else x.to(memory_format=torch.channels_last)
    assert not x.is_contiguous()
    assert_exact(net, squares, x, rows)


def test_embedding_with_a_class_twice() -> None:
    torch.manual_seed(0)
    net = nn.Embedding(3, 5)
    assert_exact(net, squares, torch.tensor([0, 1, 1, 1, 2, 0]), 2)


def test_embedding_with_a_padding_class() -> None:
    torch.manual_seed(0)
    net = nn.Embedding(3, 5, padding_idx=0)
    assert_exact(net, squares, torch.tensor([0, 1, 1, 1, 2, 0]), 2)


def moments(shape: tuple[int, ...]) -> Moments:
    low = 4 ** (len(shape) - 1) * shape[0]
    return Moments(
        shape=shape,
        low_frequencies=4,
        counts=np.ones(2),
        mean=np.random.default_rng(0).normal(size=(2, low)),
        covariance=np.stack([np.eye(low)] * 2),
        variance=np.full((2, int(np.prod(shape))), 0.1),
    )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("trainable", ["all", "small"])
@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 8, 8, 8)])
def test_the_denoiser_that_is_trained(shape: tuple[int, ...], trainable: str, rows: int) -> None:
    """MONAI's DiffusionModelUNet with attention and class embedding, inside the preconditioning, 2D and 3D."""
    torch.manual_seed(1)
    denoiser = Denoiser(moments(shape), channels=(8, 16))
    for parameter in denoiser.net.parameters():  # a fresh output layer is zero and would hide everything behind it
        nn.init.normal_(parameter, std=0.1)
    denoiser.set_trainable(trainable)
    x = torch.randn(3 * rows, *shape).clamp(-1, 1)
    noise, sigma, labels = torch.randn_like(x), torch.rand(len(x)) + 0.2, torch.arange(len(x)) % 2

    def loss_of(part: slice) -> Tensor:
        return denoiser.row_losses(x[part], labels[part], sigma=sigma[part], noise=noise[part])

    parameters = [p for p in denoiser.net.parameters() if p.requires_grad]
    expected = []
    for patient in range(3):
        gradient = torch.autograd.grad(loss_of(slice(patient * rows, (patient + 1) * rows)).mean(), parameters, allow_unused=True)
        expected.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradient, strict=True)]))
    engine = PatientGradients(denoiser.net, rows_per_patient=rows)
    found = torch.cat([g.flatten(1) for g in engine.per_patient(lambda: loss_of(slice(None)))], dim=1)
    engine.close()
    truth = torch.stack(expected)
    assert ((found - truth).norm(dim=1) / truth.norm(dim=1)).max() < 1e-5


def test_opacus_is_left_as_it_was() -> None:
    before = dict(GradSampleModule.GRAD_SAMPLERS)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    net(torch.randn(1, 3, 5, 5))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    by_engine(net, squares, torch.randn(2, 3, 5, 5), 1)
    assert dict(GradSampleModule.GRAD_SAMPLERS) == before
    assert net.state_dict().keys() == state.keys()
    assert all(parameter.grad is None for parameter in net.parameters())


class Scaled(nn.Linear):
    """A raw parameter beside inner layers."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.inner = nn.Linear(3, 3)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), nn.Embedding(3, 2, scale_grad_by_freq=True), Scaled()]
)
def test_a_layer_without_a_known_gradient_is_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(SelfCheckFailed, match=f"all_parameters_covered.*{type(layer).__name__}"):
        PatientGradients(nn.Sequential(layer), rows_per_patient=1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "layer", [nn.InstanceNorm2d(3, affine=True), nn.PReLU(3), nn.RMSNorm(6), nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect")]
)
def test_other_layers_go_through_opacus_and_are_exact(layer: nn.Module, rows: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), layer)
    assert PatientGradients(net, rows_per_patient=rows).by_opacus == (type(layer).__name__,)
    assert_exact(net, squares, torch.randn(4 * rows, 2, 6, 6), rows)


def _net_2d_or_3d(name: str, dimensions: int) -> tuple[nn.Module, Loss]:
    """A small MONAI net and a loss per row of it."""
    unet = {"num_res_blocks": 1, "channels": (8, 8), "attention_levels": (False, True), "norm_num_groups": 4, "num_head_channels": 4}
    if name == "spade":
        net = SPADEDiffusionModelUNet(
            spatial_dims=dimensions, in_channels=2, out_channels=2, label_nc=2, spade_intermediate_channels=4, **unet
        )
        return net, lambda net, x: squares(lambda x: net(x, _times(x), seg=x.detach()), x)
    if name == "controlnet":
        net = ControlNet(
            spatial_dims=dimensions, in_channels=2, conditioning_embedding_in_channels=2, conditioning_embedding_num_channels=(4,), **unet
        )
        return net, lambda net, x: squares(lambda x: _joined(net(x, _times(x), controlnet_cond=x)), x)
    if name == "unet":
        net = DiffusionModelUNet(
            spatial_dims=dimensions, in_channels=2, out_channels=2, with_conditioning=True, cross_attention_dim=5, **unet
        )
        return net, lambda net, x: squares(lambda x: net(x, _times(x), context=x.flatten(1)[:, :10].reshape(-1, 2, 5)), x)
    transposed = name == "autoencoder, transposed"
    net = AutoencoderKL(
        spatial_dims=dimensions, in_channels=2, out_channels=2, num_res_blocks=1, channels=(4, 8), attention_levels=(False, not transposed),
        latent_channels=2, norm_num_groups=4, use_convtranspose=transposed,
    )  # fmt: skip
    net.sampling = lambda mean, sigma: mean + 0.3 * sigma  # its own draw would differ from pass to pass
    return net, lambda net, x: squares(lambda x: _joined(net(x)), x)


def _times(x: Tensor) -> Tensor:
    return x.flatten(1)[:, 0].abs() * 100


def _joined(outputs: tuple[Tensor | list[Tensor], ...]) -> Tensor:
    flat = [part for output in outputs for part in (output if isinstance(output, list) else [output])]
    return torch.cat([part.flatten(1) for part in flat], dim=1)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", ["unet", "spade", "controlnet", "autoencoder", "autoencoder, transposed"])
def test_monai_nets(name: str, dimensions: int, rows: int, layout: str) -> None:
    torch.manual_seed(2)
    net, loss = _net_2d_or_3d(name, dimensions)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(3 * rows, 2, *(8,) * dimensions)
    expected = one_at_a_time(
        net, loss, x, rows
    )  # contiguous: autograd itself (torch 2.13) errs by 0.11 on single channels_last rows of SPADE
    if layout == "channels_last":
        order = torch.channels_last if dimensions == 2 else torch.channels_last_3d
        net, x = net.to(memory_format=order), x.to(memory_format=order)
    assert PatientGradients(net, rows_per_patient=rows).by_opacus == ()
    found = by_engine(net, loss, x, rows)
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5


def test_patients_of_fewer_rows_fill_up_with_rows_of_weight_zero() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 2))
    x, has = torch.randn(9, 3, 6, 6), (3, 1, 2)
    expected = torch.cat([one_at_a_time(net, squares, x[3 * p : 3 * p + n], n) for p, n in enumerate(has)])
    weights = torch.tensor([1 / n if k < n else 0.0 for n in has for k in range(3)])
    engine = PatientGradients(net, rows_per_patient=3)
    found = torch.cat([g.flatten(1) for g in engine.per_patient(lambda: squares(net, x), weights=weights)], dim=1)
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5


def test_bfloat16_is_close_and_its_clip_bound_is_exact() -> None:
    """The clip sees the very float32 tensors that are added up, so rounding in the net cannot break the bound."""
    torch.manual_seed(1)
    net, loss = _net_2d_or_3d("unet", 2)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(4, 2, 8, 8)
    expected = one_at_a_time(net, loss, x, 1)

    def rounded() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(net, x).float()

    engine = PatientGradients(net, rows_per_patient=1)
    gradients = engine.per_patient(rounded)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    found = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 0.1
    total, _ = clipped_sum(gradients, clip_norm=0.1)
    without, _ = clipped_sum([gradient[1:] for gradient in gradients], clip_norm=0.1)
    assert float((total - without).norm()) <= 0.1 * (1 + 1e-5)


def test_an_input_changed_in_place_after_its_layer_is_named() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            y = self.second(h)
            h += 1
            return y + h

    net = InPlace()
    with pytest.raises(SelfCheckFailed, match="in place"):
        PatientGradients(net, rows_per_patient=1).per_patient(lambda: squares(net, torch.randn(2, 3)))


@pytest.mark.parametrize("rows", [1, 2])
def test_opacus_is_the_oracle_where_it_is_right(rows: int) -> None:
    """Contiguous activations; its gradients of rows, folded by patient."""
    torch.manual_seed(3)
    net, loss = _net_2d_or_3d("unet", 2)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(3 * rows, 2, 8, 8)
    ours = by_engine(net, loss, x, rows)
    oracle = OpacusGradients(net, rows_per_patient=rows)
    theirs = torch.cat([g.reshape(3, rows, -1).sum(1) for g in oracle.per_patient(lambda: loss(oracle.hooked, x))], dim=1)
    oracle.close()
    assert ((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max() < 1e-5


def test_the_clipped_sum_is_clipped_by_patient() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(5, 3, 2), torch.randn(5, 7)]
    gradients[0][0] *= 1e-3
    gradients[1][0] *= 1e-3
    flat = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
    expected = sum(row * min(1.0, 0.7 / float(row.norm())) for row in flat)
    total, contributions = clipped_sum(gradients, clip_norm=0.7)
    assert torch.allclose(total, torch.as_tensor(expected), atol=1e-6)
    assert float(contributions.max()) <= 0.7 * (1 + 1e-6)
    assert float(contributions[0]) == pytest.approx(float(flat[0].norm()), rel=1e-5)


def test_the_order_in_memory_does_not_change_the_clipped_sum() -> None:
    torch.manual_seed(0)
    plain = torch.randn(5, 2, 3, 4, 6)
    expected, norms = clipped_sum([plain], clip_norm=0.7)
    for order in itertools.permutations(range(1, 5)):
        back = [0, *(1 + order.index(axis) for axis in range(1, 5))]
        strided = plain.permute(0, *order).contiguous().permute(back)
        assert torch.equal(strided, plain)
        total, contributions = clipped_sum([strided], clip_norm=0.7)
        assert torch.allclose(total, expected, atol=1e-6)
        assert torch.allclose(contributions, norms)


@pytest.mark.parametrize("numbers", [10_000, 10_000_000])
def test_the_bound_holds_for_large_parameters(numbers: int) -> None:
    """Added up in float32 alone, the norm of ten million equal numbers is 0.8 % too small."""
    total, _ = clipped_sum([torch.full((1, numbers), 0.1)], clip_norm=1.0)
    assert float(total.double().norm()) <= 1 + 1e-5


def test_a_parameter_that_is_not_used_is_named() -> None:
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    with pytest.raises(SelfCheckFailed, match="got no per-patient gradient"):
        PatientGradients(net, rows_per_patient=1).per_patient(lambda: squares(net["used"], torch.randn(2, 3)))


def test_a_layer_that_opacus_computes_is_taken_as_it_is_now() -> None:
    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.gain = nn.Parameter(torch.randn(4)), 1.0

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x * self.w * self.gain)

    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), Gained()), torch.randn(4, 3)
    engine = PatientGradients(net, rows_per_patient=1)
    for gain in (1.0, 3.0):
        net[1].gain = gain
        expected = one_at_a_time(net, squares, x, 1)
        found = torch.cat([g.flatten(1) for g in engine.per_patient(lambda: squares(net, x))], dim=1)
        assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5


@pytest.mark.parametrize("norm", [10.0**power for power in range(-44, 39, 2)])
@pytest.mark.parametrize("clip_norm", [1e-35, 1e-6, 0.05, 1e5])
def test_the_bound_holds_however_long_a_gradient_is(clip_norm: float, norm: float) -> None:
    """A factor below 1e-38 is rounded by much of itself: a patient would add more than the clip norm, and the check of it would tell."""
    gradient = torch.nn.functional.normalize(torch.randn(5, 300, generator=torch.Generator().manual_seed(0)), dim=1) * norm
    for row in gradient:
        total, contributions = clipped_sum([row[None]], clip_norm=clip_norm)
        assert float(total.double().norm()) <= clip_norm * (1 + 1e-5)
        assert float(contributions.max()) <= clip_norm * (1 + 1e-5)


def test_broken_gradients_give_the_others_no_longer_a_share() -> None:
    long, broken = torch.eye(4)[:3] * 1e3, torch.full((3, 4), 1e30)
    total, contributions = clipped_sum([torch.cat([long, broken])], clip_norm=0.5)
    assert total.tolist() == pytest.approx([0.5, 0.5, 0.5, 0.0])
    assert contributions.tolist() == pytest.approx([0.5] * 3 + [0.0] * 3)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e30])
def test_a_patient_with_a_broken_gradient_cannot_pass_the_bound(broken: float) -> None:
    gradients = [torch.ones(2, 4)]
    gradients[0][0, 1] = broken
    total, contributions = clipped_sum(gradients, clip_norm=0.5)
    assert torch.isfinite(total).all()
    assert float(contributions.max()) <= 0.5 * (1 + 1e-6)
    healthy, _ = clipped_sum([torch.ones(1, 4)], clip_norm=0.5)
    assert float((total - healthy).norm()) <= 0.5 * (1 + 1e-6)
