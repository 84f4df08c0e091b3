"""Known-bad training engines and nets: each must be refused, by name, before anything is charged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.nets import VQVAE
from opacus_gradients import OpacusGradients
from torch import Tensor, nn

from dpsynth.errors import SelfCheckFailed
from dpsynth.privacy.mechanism import PoissonDpSgd
from dpsynth.privacy.noise import NoiseStream
from dpsynth.train.dpsgd import Engine, private_mean
from dpsynth.train.gradients import PatientGradients
from dpsynth.train.poisson import poisson_batch
from dpsynth.train.selfcheck import dispersion_p, fixed_rows, require, sampler_finding, self_check

MECHANISM = PoissonDpSgd(noise_multiplier=1.3, clip_norm=0.5, sampling_probability=0.1, steps=10, declared_patients=200)
SHAPE = (2, 8, 8)


class SmallNet(nn.Module):
    """Convolutions that see their input without padding, where a wrong memory layout shows."""

    def __init__(self, *, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3)
        self.norm = norm or nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(x)))).flatten(1)


def losses(net: nn.Module, x: Tensor, levels: Tensor) -> Tensor:
    return (net(x) * levels[:, None]).square().mean(1)


def checked(net: nn.Module, *, engine: Engine | None = None, rows: int = 1) -> dict[str, bool]:
    findings = self_check(net, fixed_rows(losses), SHAPE, mechanism=MECHANISM, rows_per_patient=rows, engine=engine or Engine())
    return {name: finding.ok for name, finding in findings.items()}


def failed(results: dict[str, bool]) -> set[str]:
    return {name for name, ok in results.items() if not ok}


@pytest.mark.parametrize("rows", [1, 3])
def test_the_real_engine_passes(rows: int) -> None:
    assert failed(checked(SmallNet(), rows=rows)) == set()


def test_the_answer_names_the_layers_that_opacus_computes() -> None:
    net = SmallNet(norm=nn.InstanceNorm2d(4, affine=True))
    findings = self_check(net, fixed_rows(losses), SHAPE, mechanism=MECHANISM, rows_per_patient=2)
    assert all(finding.ok for finding in findings.values())
    assert "Opacus' functorch for InstanceNorm2d" in findings["all_parameters_covered"].detail


def no_noise(total: Tensor, *, mechanism: PoissonDpSgd, stream: NoiseStream, step: int) -> Tensor:
    return total.double() / mechanism.expected_batch_size


def half_noise(total: Tensor, *, mechanism: PoissonDpSgd, stream: NoiseStream, step: int) -> Tensor:
    full = private_mean(total, mechanism=mechanism, stream=stream, step=step)
    return (full + total.double() / mechanism.expected_batch_size) / 2


def same_noise(total: Tensor, *, mechanism: PoissonDpSgd, stream: NoiseStream, step: int) -> Tensor:
    return private_mean(total, mechanism=mechanism, stream=stream, step=0)


def tiled_noise(total: Tensor, *, mechanism: PoissonDpSgd, stream: NoiseStream, step: int) -> Tensor:
    """A few thousand numbers, over and over."""
    noise = np.resize(stream.normal("gradient", step, 4000), len(total))
    return (total.double() + mechanism.noise_stddev * torch.from_numpy(noise)) / mechanism.expected_batch_size


@pytest.mark.parametrize("fault", [no_noise, half_noise, same_noise, tiled_noise])
def test_noise_that_is_off_halved_or_repeated_is_caught(fault) -> None:
    assert failed(checked(SmallNet(), engine=Engine(noise=fault))) == {"noise_scale"}


def no_clip(gradients: list[Tensor], *, clip_norm: float) -> tuple[Tensor, Tensor]:
    flat = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
    return flat.sum(0), flat.norm(dim=1).clamp(max=clip_norm)  # and it lies about the norms


def batch_clip(gradients: list[Tensor], *, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Clips the mean of the batch, as in ordinary training, and scales it up again."""
    flat = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
    mean = flat.mean(0)
    clipped = mean * (clip_norm / mean.norm()).clamp(max=1) * len(flat)
    return clipped, torch.full((len(flat),), clip_norm)


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("fault", [no_clip, batch_clip])
def test_clipping_that_is_off_or_of_the_batch_is_caught(fault, size: float) -> None:
    """Also in a net that normalises its input and whose gradients are shorter than the clip norm, whatever comes in."""
    net = SmallNet()
    with torch.no_grad():
        net.second.weight *= size
        net.second.bias *= size
    assert failed(checked(net, engine=Engine(clip=fault))) == {"contribution_bounded"}
    assert failed(checked(net)) == set()


def shuffled(stream: NoiseStream, *, step: int, probability: float, num_patients: int) -> np.ndarray:
    """Every patient once per pass in fixed-size batches, the usual data loader."""
    per_pass = round(1 / probability)
    order = np.argsort(stream.uniform("shuffle", step // per_pass, num_patients))
    return np.array_split(order, per_pass)[step % per_pass]


def fixed_size(stream: NoiseStream, *, step: int, probability: float, num_patients: int) -> np.ndarray:
    return np.argsort(stream.uniform("shuffle", step, num_patients))[: round(probability * num_patients)]


def too_often(stream: NoiseStream, *, step: int, probability: float, num_patients: int) -> np.ndarray:
    return poisson_batch(stream, step=step, probability=1.3 * probability, num_patients=num_patients)


def favourites(stream: NoiseStream, *, step: int, probability: float, num_patients: int) -> np.ndarray:
    """The right sizes on average, but some patients are drawn more often."""
    weights = np.where(np.arange(num_patients) % 2, 1.6, 0.4) * probability
    return np.flatnonzero(stream.uniform("batch", step, num_patients) < weights)


def predictable(stream: NoiseStream, *, step: int, probability: float, num_patients: int) -> np.ndarray:
    """Poisson sampling by a public seed: the right law, and anyone can repeat it."""
    return np.flatnonzero(np.random.default_rng(step).random(num_patients) < probability)


@pytest.mark.parametrize("fault", [shuffled, fixed_size, too_often, favourites, predictable])
def test_samplers_other_than_poisson_are_caught(fault) -> None:
    assert failed(checked(SmallNet(), engine=Engine(sample=fault))) == {"sampler_poisson"}


@pytest.mark.parametrize("probability", [0.001, 0.01, 0.5, 0.9])
def test_the_sampler_is_judged_at_any_probability(probability: float) -> None:
    stream = NoiseStream(key=b"k" * 32)
    assert sampler_finding(probability, stream, Engine()).ok
    for fault in (fixed_size, predictable, *([favourites] if probability < 0.6 else [])):
        assert not sampler_finding(probability, stream, Engine(sample=fault)).ok, fault.__name__


def test_scatter_has_the_stated_false_alarm_rate() -> None:
    """By simulation; at 1 in 1000, more than 40 alarms in 20,000 happen once in 10,000 times."""
    rng = np.random.default_rng(0)
    for patients, probability, steps in ((400, 0.1, 40), (100, 0.05, 100), (80, 0.01, 40), (20, 0.05, 100)):
        counts = rng.binomial(patients, probability, size=(20_000, steps))
        assert sum(dispersion_p(row, patients, probability) < 1e-3 for row in counts) <= 40


def test_opacus_own_convolution_sampler_is_caught_on_channels_last() -> None:
    assert "gradients_exact" in failed(checked(SmallNet(), engine=Engine(gradients=OpacusGradients)))


def test_several_rows_of_a_patient_under_a_row_sampler_are_caught() -> None:
    results = checked(SmallNet(), engine=Engine(gradients=OpacusGradients), rows=2)
    assert failed(results) & {"gradients_exact", "contribution_bounded", "all_parameters_covered"}


class Wrong(PatientGradients):
    """One percent off, in every layout alike."""

    def per_patient(self, row_losses, *, weights=None):
        return [0.99 * gradient for gradient in super().per_patient(row_losses, weights=weights)]


class WrongBehindZero(PatientGradients):
    """The first layer's gradient is halved; behind a layer that starts at zero nobody would see it."""

    def per_patient(self, row_losses, *, weights=None):
        first, *rest = super().per_patient(row_losses, weights=weights)
        return [first / 2, *rest]


class NotNumbers(PatientGradients):
    """Comparisons with what is no number are never true, so they must not be what decides."""

    def per_patient(self, row_losses, *, weights=None):
        return [gradient * float("nan") for gradient in super().per_patient(row_losses, weights=weights)]


def test_gradients_that_are_no_numbers_are_caught() -> None:
    assert "gradients_exact" in failed(checked(SmallNet(), engine=Engine(gradients=NotNumbers)))


def test_a_net_without_any_gradient_is_refused() -> None:
    class Silent(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * super().forward(x)

    assert "gradients_exact" in failed(checked(Silent()))


def test_gradients_that_are_a_little_wrong_are_caught() -> None:
    assert "gradients_exact" in failed(checked(SmallNet(), engine=Engine(gradients=Wrong)))


def test_a_wrong_gradient_behind_a_zero_layer_is_caught() -> None:
    net = SmallNet()
    nn.init.zeros_(net.second.weight)
    assert "gradients_exact" in failed(checked(net, engine=Engine(gradients=WrongBehindZero)))


def test_a_clip_that_trusts_ordinary_norms_is_caught() -> None:
    """Right for every ordinary image; an extreme one gets through."""

    def trusting(gradients, *, clip_norm):
        flat = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
        factor = (clip_norm / flat.norm(dim=1).clamp(max=100.0)).clamp(max=1.0)
        return flat.T @ factor, (flat.norm(dim=1) * factor).clamp(max=clip_norm)

    assert failed(checked(SmallNet(norm=nn.Identity()), engine=Engine(clip=trusting))) == {"contribution_bounded"}


def test_a_net_that_cannot_be_judged_on_ordinary_numbers_is_refused() -> None:
    """Its gradients there are not numbers, which would hide that it mixes patients."""

    class LogMix(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.log1p(x)
            return super().forward(x - x.mean(0, keepdim=True))

    assert "gradients_exact" in failed(checked(LogMix()))


@pytest.mark.parametrize("when", ["gradients are asked for", "parameters ask for none"])
def test_a_buffer_that_changes_in_training_only_is_caught(when: str) -> None:
    class Keeping(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("memory", torch.zeros(2, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled() if when == "gradients are asked for" else not self.first.weight.requires_grad:
                self.memory.copy_(x[0].detach())
            return super().forward(x)

    assert "buffers_unchanged" in failed(checked(Keeping()))


def test_a_net_that_breaks_when_run_by_patient_is_refused_and_not_a_crash() -> None:
    class Lstm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTM(8, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x[:, 0])[0].flatten(1)

    assert "all_parameters_covered" in failed(checked(Lstm()))


def test_batch_norm_is_caught_by_name() -> None:
    findings = self_check(SmallNet(norm=nn.BatchNorm2d(4)), fixed_rows(losses), SHAPE, mechanism=MECHANISM, rows_per_patient=1)
    assert not findings["buffers_unchanged"].ok
    assert "norm.running_mean" in findings["buffers_unchanged"].detail
    assert not findings["all_parameters_covered"].ok
    with pytest.raises(SelfCheckFailed, match=r"buffers_unchanged.*batch statistics"):
        require(findings)


def test_an_ema_codebook_is_caught_by_name() -> None:
    net = VQVAE(
        spatial_dims=2, in_channels=2, out_channels=3, channels=(4, 4), num_res_channels=(4, 4), num_res_layers=1,
        downsample_parameters=((2, 4, 1, 1), (2, 4, 1, 1)), upsample_parameters=((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)),
        num_embeddings=8, embedding_dim=4,
    )  # fmt: skip

    def codebook_losses(net: nn.Module, x: Tensor, levels: Tensor) -> Tensor:
        return (net(x)[0].flatten(1) * levels[:, None]).square().mean(1)

    findings = self_check(net, fixed_rows(codebook_losses), SHAPE, mechanism=MECHANISM, rows_per_patient=1)
    assert not findings["buffers_unchanged"].ok
    assert "codebook" in findings["buffers_unchanged"].detail


def test_a_layer_that_mixes_patients_is_caught() -> None:
    class Mixing(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0, keepdim=True))

    assert failed(checked(Mixing())) & {"gradients_exact", "contribution_bounded"}


def test_a_raw_trainable_parameter_is_refused() -> None:
    class Raw(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale.repeat(36)

    assert "all_parameters_covered" in failed(checked(Raw()))
