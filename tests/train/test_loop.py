"""The DP-SGD loop on a small denoiser: sensitivity on the real path, the booked sampler, and resuming bit by bit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpsynth.config import DiffusionConfig
from dpsynth.data.cohort import ImageSet
from dpsynth.errors import ArtifactError
from dpsynth.model.denoiser import Denoiser, noise_levels
from dpsynth.model.moment_release import release_moments
from dpsynth.model.moments import public_reference
from dpsynth.privacy.mechanism import PoissonDpSgd
from dpsynth.privacy.noise import NoiseStream
from dpsynth.train.canaries import NUMBER
from dpsynth.train.dpsgd import ENGINE, Engine
from dpsynth.train.gradients import PatientGradients, clipped_sum
from dpsynth.train.loop import SMALLEST_SIGMA, draw_rows, fit
from dpsynth.train.poisson import poisson_batch

PATIENTS = 24
MECHANISM = PoissonDpSgd(noise_multiplier=1.0, clip_norm=0.05, sampling_probability=0.3, steps=6, declared_patients=20)
SETTINGS = DiffusionConfig(channels=(8, 16), draws=2, patients_per_chunk=4, checkpoint_every=2, learning_rate=1e-2, trainable="all")
STREAM = NoiseStream(key=b"s" * 32)


def images_of(patients: int = PATIENTS) -> ImageSet:
    rng = np.random.default_rng(0)
    numbers = np.concatenate([np.arange(patients), np.arange(0, patients, 3)])
    return ImageSet(
        images=rng.uniform(-1, 1, (len(numbers), 1, 8, 8)).astype(np.float32),
        labels=numbers % 2,
        patients=numbers,
        patient_ids=tuple(f"p{number}" for number in range(patients)),
        classes=("a", "b"),
        attributes=({},) * len(numbers),
    )


TRAINING = images_of()


def fresh_denoiser() -> Denoiser:
    public = np.random.default_rng(9).uniform(-1, 1, (60, 1, 8, 8)).astype(np.float32)
    moments = release_moments(
        public,
        np.arange(60) % 2,
        np.arange(60),
        num_classes=2,
        mechanism=None,
        reference=public_reference(public, low_frequencies=4),
        stream=None,
    )
    torch.manual_seed(0)
    denoiser = Denoiser(moments, channels=SETTINGS.channels)
    for parameter in denoiser.net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return denoiser


class Killed(Exception):
    pass


def trained(
    path: Path, *, settings: DiffusionConfig = SETTINGS, engine: Engine = ENGINE, stop_after: int | None = None, binding: str = "r1"
) -> dict[str, torch.Tensor]:
    denoiser = fresh_denoiser()

    def callback(step: int) -> None:
        if step == stop_after:
            raise Killed

    fit(denoiser, TRAINING, MECHANISM, settings, stream=STREAM, checkpoint=path, binding=binding, callback=callback, engine=engine)
    return {name: tensor.clone() for name, tensor in denoiser.net.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_a_run_that_was_stopped_goes_on_bit_by_bit(tmp_path: Path, stop_after: int) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(Killed):
        trained(tmp_path / "stopped", stop_after=stop_after)
    assert equal(trained(tmp_path / "stopped"), whole)


def test_training_changes_the_weights_and_another_key_changes_them_otherwise(tmp_path: Path) -> None:
    whole = trained(tmp_path / "a")
    assert not equal(whole, fresh_denoiser().net.state_dict())

    def other_noise(total: torch.Tensor, *, mechanism: PoissonDpSgd, stream: NoiseStream, step: int) -> torch.Tensor:
        return ENGINE.noise(total, mechanism=mechanism, stream=NoiseStream(key=b"t" * 32), step=step)

    assert not equal(trained(tmp_path / "b", engine=replace(ENGINE, noise=other_noise)), whole)


def test_a_checkpoint_of_another_reservation_or_a_broken_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        trained(path, stop_after=3)
    with pytest.raises(ArtifactError, match="another reservation"):
        trained(path, binding="r2")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match="cannot be read"):
        trained(path)


def test_chunks_change_memory_and_not_the_result(tmp_path: Path) -> None:
    totals: dict[int, list[torch.Tensor]] = {}
    for chunk in (1, 4, 100):

        def keep(total: torch.Tensor, *, chunk: int = chunk, **rest: object) -> torch.Tensor:
            totals.setdefault(chunk, []).append(total.clone())
            return torch.zeros_like(total, dtype=torch.float64)  # the weights stay, so every step compares the same net

        settings = SETTINGS.model_copy(update={"patients_per_chunk": chunk, "learning_rate": 1e-12})
        trained(tmp_path / str(chunk), settings=settings, engine=replace(ENGINE, noise=keep))
    for one, other in itertools.combinations(totals.values(), 2):
        for a, b in zip(one, other, strict=True):
            assert torch.allclose(a, b, atol=1e-5 * MECHANISM.clip_norm)


def test_what_gets_noise_is_the_sum_of_each_patients_clipped_mean_over_rows(tmp_path: Path) -> None:
    """The whole loop against autograd, one patient at a time: clipped once per patient, to the booked norm, added once."""
    seen: list[torch.Tensor] = []

    def keep(total: torch.Tensor, **rest: object) -> torch.Tensor:
        seen.append(total[:-NUMBER].clone())  # behind the weights are the canaries
        return torch.zeros_like(total, dtype=torch.float64)

    settings = SETTINGS.model_copy(update={"draws": 3, "learning_rate": 1e-12})
    trained(tmp_path / "x", settings=settings, engine=replace(ENGINE, noise=keep))
    denoiser = fresh_denoiser()
    parameters = list(denoiser.net.parameters())
    for step, total in enumerate(seen):
        chosen = poisson_batch(STREAM, step=step, probability=MECHANISM.sampling_probability, num_patients=PATIENTS)
        rows = draw_rows(TRAINING, TRAINING.rows_of(), chosen, draws=3, stream=STREAM, step=step)
        expected = torch.zeros_like(total)
        for number in range(len(chosen)):
            own = slice(3 * number, 3 * number + 3)
            loss = denoiser.row_losses(rows.clean[own], rows.labels[own], sigma=rows.sigma[own], noise=rows.noise[own]).mean()
            gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
            expected += gradient * min(1.0, MECHANISM.clip_norm / float(gradient.norm()))
        assert float((total - expected).norm()) < 1e-4 * MECHANISM.clip_norm


def test_no_noise_number_comes_twice_in_a_run_and_its_scale_is_exact(tmp_path: Path) -> None:
    drawn: list[np.ndarray] = []

    def nobody(*_: object, **__: object) -> np.ndarray:
        return np.empty(0, dtype=np.int64)

    def keep(total: torch.Tensor, **rest: object) -> torch.Tensor:
        drawn.append(ENGINE.noise(total, **rest).numpy())  # type: ignore[arg-type]
        return torch.from_numpy(drawn[-1])

    trained(tmp_path / "x", engine=replace(ENGINE, sample=nobody, noise=keep))
    assert len(np.unique(drawn)) > 0.999 * np.size(drawn)
    for step, noise in enumerate(drawn):
        standard = STREAM.normal("gradient", step, len(noise))
        assert np.allclose(noise * MECHANISM.expected_batch_size, MECHANISM.noise_stddev * standard, rtol=1e-12)


def test_the_monitor_names_a_clip_that_lets_more_through(tmp_path: Path) -> None:
    def loose(gradients: list[torch.Tensor], *, clip_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        return clipped_sum(gradients, clip_norm=1.5 * clip_norm)

    found = []
    for engine in (ENGINE, replace(ENGINE, clip=loose)):
        denoiser, path = fresh_denoiser(), tmp_path / str(len(found))
        monitor = fit(
            denoiser, TRAINING, MECHANISM, SETTINGS, stream=STREAM, checkpoint=path, binding="r", callback=lambda _: None, engine=engine
        )
        found.append(monitor.findings(MECHANISM, PATIENTS)["live_contribution_bounded"].ok)
    assert found == [True, False]


def test_an_empty_batch_is_a_step_of_pure_noise(tmp_path: Path) -> None:
    seen = []

    def nobody(*_: object, **__: object) -> np.ndarray:
        return np.empty(0, dtype=np.int64)

    def keep(total: torch.Tensor, **rest: object) -> torch.Tensor:
        seen.append(total)
        return ENGINE.noise(total, **rest)  # type: ignore[arg-type]

    trained(tmp_path / "x", engine=replace(ENGINE, sample=nobody, noise=keep))
    assert len(seen) == MECHANISM.steps
    assert all(float(total.abs().max()) == 0 for total in seen)


def test_what_the_noise_returned_is_the_gradient_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    returned, written, real = [], [], torch.optim.Adam.step

    def keep(total: torch.Tensor, **rest: object) -> torch.Tensor:
        returned.append(ENGINE.noise(total, **rest))  # type: ignore[arg-type]
        return returned[-1]

    def step(self: torch.optim.Adam, *rest: object) -> object:
        written.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))
        return real(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    trained(tmp_path / "x", engine=replace(ENGINE, noise=keep))
    assert len(written) == MECHANISM.steps
    assert all(torch.equal(one, other[:-NUMBER].float()) for one, other in zip(written, returned, strict=True))


def test_the_patients_of_a_step_are_those_of_the_booked_sampler(tmp_path: Path) -> None:
    asked = []

    def sample(stream: NoiseStream, *, step: int, probability: float, num_patients: int) -> np.ndarray:
        asked.append((step, probability, num_patients))
        return poisson_batch(stream, step=step, probability=probability, num_patients=num_patients)

    plain = trained(tmp_path / "plain")
    assert equal(trained(tmp_path / "x", engine=replace(ENGINE, sample=sample)), plain)
    assert asked == [(step, MECHANISM.sampling_probability, PATIENTS + NUMBER) for step in range(MECHANISM.steps)]


@pytest.mark.parametrize("draws", [1, 2, 5])
def test_each_chosen_patient_gets_rows_of_their_own_images_only(draws: int) -> None:
    chosen = np.array([0, 3, 4, 20])
    rows_of = TRAINING.rows_of()
    rows = draw_rows(TRAINING, rows_of, chosen, draws=draws, stream=STREAM, step=2)
    assert len(rows.clean) == len(rows.sigma) == len(rows.noise) == len(chosen) * draws
    for index, patient in enumerate(chosen):
        own = TRAINING.images[rows_of[patient]]
        for row in rows.clean[index * draws : (index + 1) * draws].numpy():
            assert any(np.array_equal(row, image) for image in own)
    quantiles = torch.arange(draws + 1, dtype=torch.float64) / draws
    edges = noise_levels(torch.special.ndtri(quantiles), smallest=SMALLEST_SIGMA, largest=0.5)
    places = torch.bucketize(rows.sigma.double(), edges[1:-1].double()).view(len(chosen), draws)
    assert torch.equal(places.sort(dim=1).values, torch.arange(draws).expand(len(chosen), draws)), "a patient's levels are spread"
    used = {row.tobytes() for row in rows.clean[: 2 * draws].numpy()}
    assert draws == 1 or len(used) == 4  # patients 0 and 3 have two images each, and both are used


@pytest.mark.parametrize("fault", ["none", "extreme pixels", "every pixel the same"])
def test_one_patient_moves_the_clipped_sum_by_at_most_the_clip_norm(fault: str) -> None:
    """The sensitivity itself, on the code that trains: the same step with and without each patient of the batch."""
    training = images_of()
    if fault != "none":
        training.images[training.patients == 5] = 1e4 if fault == "extreme pixels" else 1.0
    denoiser = fresh_denoiser()
    chosen = np.arange(0, 12)
    rows = draw_rows(training, training.rows_of(), chosen, draws=2, stream=STREAM, step=0)
    engine = PatientGradients(denoiser.net, rows_per_patient=2)

    def total(without: int | None) -> torch.Tensor:
        kept = np.array([row for row in range(24) if without is None or row // 2 != without])
        gradients = engine.per_patient(
            lambda: denoiser.row_losses(rows.clean[kept], rows.labels[kept], sigma=rows.sigma[kept], noise=rows.noise[kept])
        )
        return clipped_sum(gradients, clip_norm=MECHANISM.clip_norm)[0]

    whole = total(None)
    changes = [float((whole - total(patient)).norm()) for patient in range(12)]
    assert max(changes) <= MECHANISM.clip_norm * (1 + 1e-4)
    assert max(changes) > 0.5 * MECHANISM.clip_norm, "the clip is never reached, so this shows nothing"
