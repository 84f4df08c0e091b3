"""The baselines keep the guarantee they are compared under, and the evaluator measures what it says."""

from __future__ import annotations

from dataclasses import replace

import dp_cgan
import dp_feta
import dp_merf
import dpdm
import numpy as np
import pytest
import torch
import tutorial_loop
from edm import EdmDenoiser, unet
from opacus import GradSampleModule
from private import Task, booked_sgd, labels_like, noised_sum, one_release, private_steps, spent
from scipy.ndimage import gaussian_filter

from dpsynth.checks.classifier import worst_recall
from dpsynth.checks.gaussian_distance import frechet_distance
from dpsynth.checks.statistics import kid
from dpsynth.config import GenerateConfig
from dpsynth.data.cohort import ImageSet
from dpsynth.data.phantom import phantom_images
from dpsynth.model.descriptors import descriptors
from dpsynth.privacy.mechanism import PoissonDpSgd
from dpsynth.train.loop import images_in_turn

PATIENTS = 12
OF_OPACUS = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def task_of(patients: int = PATIENTS, *, images_each: int = 3, steps: int = 20) -> Task:
    """Patients of several images, in two classes each; the last one's images are as bright as can be."""
    rng = np.random.default_rng(0)
    numbers = np.repeat(np.arange(patients), images_each)
    images = rng.uniform(-1, 1, (len(numbers), 1, 16, 16)).astype(np.float32)
    images[numbers == patients - 1] = 1
    training = ImageSet(
        images=images, labels=np.arange(len(numbers)) % 2, patients=numbers, patient_ids=tuple(str(n) for n in range(patients)),
        classes=("a", "b"), attributes=({},) * len(numbers),
    )  # fmt: skip
    public = rng.uniform(-1, 1, (30, 1, 16, 16)).astype(np.float32)
    return Task(training=training, public=public, epsilon=3, delta=1e-5, declared_patients=100, seed=0, steps=steps)


def without_last(task: Task) -> Task:
    return replace(task, training=task.training.subset(np.arange(task.training.num_patients - 1)))


@pytest.mark.parametrize("images_each", [1, 5])
def test_a_patient_changes_the_mean_embedding_by_at_most_its_clip_norm(images_each: int) -> None:
    task = task_of(images_each=images_each)
    embedding = dp_merf.Embedding(task.public, seed=0)
    change = np.linalg.norm(dp_merf.embedding_sums(task, embedding) - dp_merf.embedding_sums(without_last(task), embedding))
    assert change <= dp_merf.query_norm() * (1 + 1e-9)
    assert change > 0.5 * dp_merf.query_norm()  # the bound is not met by adding nothing


@pytest.mark.parametrize("images_each", [1, 5])
def test_a_patient_changes_the_central_sums_by_at_most_their_clip_norm(images_each: int) -> None:
    task = task_of(images_each=images_each)
    groups = np.arange(PATIENTS) % 3
    change = np.linalg.norm(dp_feta.group_sums(task, groups, 3) - dp_feta.group_sums(without_last(task), groups, 3))
    assert change <= dp_feta.query_norm(task.shape) * (1 + 1e-9)
    assert change > 0.5 * dp_feta.query_norm(task.shape)


def test_central_images_use_public_numbers_and_noise_alone_for_their_layout() -> None:
    task = task_of()
    release = one_release(task, clip_norm=dp_feta.query_norm(task.shape), share=dp_feta.SHARE)
    assert dp_feta.number_of_groups(task, release) == dp_feta.number_of_groups(without_last(task), release)
    images, labels, frequencies = dp_feta.central_images(task, release)
    assert images.shape == (len(labels), 1, 16, 16)
    assert (frequencies > 0).all()
    assert np.abs(images).max() <= 1


def steps_of(method: str, task: Task, mechanism: PoissonDpSgd) -> torch.Tensor:
    """Weights of the privately trained net after the mechanism's steps with plain descent of rate 1, less the weights before."""
    torch.manual_seed(0)
    gradients, net = None, None
    if method == "dpdm":
        denoiser = EdmDenoiser(task.shape, 2, seed=0)
        net, losses, rows = denoiser.net, dpdm.row_losses(denoiser, task), dpdm.DRAWS
    elif method == "dp-cgan":
        generator, net = dp_merf.Generator(task.shape, 2), dp_cgan.Discriminator(task.shape, 2)
        losses, rows = dp_cgan.pair_losses(generator, net, task), 2
    else:
        net, packing = unet(task.shape, 2, 0)
        hooked = GradSampleModule(net)
        losses, rows, gradients = tutorial_loop.row_losses(hooked, packing, task), 1, tutorial_loop.per_row(hooked)
    before = torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    private_steps(
        net, task, mechanism, losses, rows=rows, optimizer=torch.optim.SGD(net.parameters(), lr=1.0), gradients=gradients
    )  # fmt: skip
    return torch.nn.utils.parameters_to_vector(net.parameters()).detach() - before


@OF_OPACUS
@pytest.mark.parametrize("method", ["dpdm", "dp-cgan", "tutorial"])
def test_a_lone_patient_moves_the_weights_by_the_clip_norm_over_the_public_batch(method: str) -> None:
    task = task_of(1, images_each=3)
    mechanism = PoissonDpSgd(noise_multiplier=1e-9, clip_norm=1e-3, sampling_probability=1, steps=1, declared_patients=50)
    moved = steps_of(method, task, mechanism).norm().item()
    assert moved == pytest.approx(1e-3 / 50, rel=1e-2)  # a gradient longer than the clip norm becomes just as long


@OF_OPACUS
@pytest.mark.parametrize("method", ["dpdm", "dp-cgan", "tutorial"])
def test_patients_are_clipped_one_by_one(method: str) -> None:
    task = task_of(PATIENTS)
    mechanism = PoissonDpSgd(noise_multiplier=1e-9, clip_norm=1e-4, sampling_probability=1, steps=1, declared_patients=1)
    moved = steps_of(method, task, mechanism).norm().item()
    assert 1.5e-4 < moved <= PATIENTS * 1e-4 * (1 + 1e-3)  # clipping the batch as one would leave 1e-4


def test_the_denoiser_of_the_baselines_takes_volumes_of_sizes_that_have_to_be_padded() -> None:
    denoiser = EdmDenoiser((1, 12, 16, 20), 1, seed=0)
    images = torch.rand(3, 1, 12, 16, 20)
    assert denoiser(images, torch.tensor([0.1, 1.0, 5.0]), torch.zeros(3, dtype=torch.int64)).shape == images.shape


def test_an_empty_batch_is_a_step_of_noise() -> None:
    mechanism = PoissonDpSgd(noise_multiplier=2.0, clip_norm=1e-3, sampling_probability=1e-9, steps=1, declared_patients=10**9)
    moved = steps_of("dpdm", task_of(), mechanism)
    assert moved.std().item() == pytest.approx(2e-3, rel=0.02)


@OF_OPACUS
def test_the_hooks_of_opacus_give_each_row_its_own_gradient() -> None:
    task = task_of()
    net, packing = unet(task.shape, 2, 0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    hooked = GradSampleModule(net)
    loss = tutorial_loop.row_losses(hooked, packing, task)(np.array([0, 7, 11]), torch.Generator().manual_seed(0))
    found = tutorial_loop.per_row(hooked)(loss)
    for row in range(3):
        net.zero_grad()
        loss()[row].backward()
        own = [parameter.grad for parameter in net.parameters()]
        assert all(torch.allclose(a[row], b, rtol=1e-3, atol=1e-5) for a, b in zip(found, own, strict=True))


@pytest.mark.parametrize("epsilon", [1.0, 10.0])
def test_one_shot_and_steps_together_cost_at_most_epsilon(epsilon: float) -> None:
    task = replace(task_of(steps=50), epsilon=epsilon)
    alone = one_release(task, clip_norm=1.0)
    first = one_release(task, clip_norm=1.0, share=dp_feta.SHARE)
    sgd = booked_sgd(task, sampling_probability=0.05, clip_norm=1.0, before=(first,))
    for mechanisms in ((alone,), (first, sgd)):
        assert 0.97 * epsilon < spent(mechanisms, 1e-5) <= epsilon
    assert spent((first, replace(sgd, noise_multiplier=0.9 * sgd.noise_multiplier)), 1e-5) > epsilon


def test_the_noise_of_a_release_is_the_booked_one() -> None:
    task = task_of()
    release = one_release(task, clip_norm=3.0)
    noise = noised_sum(np.zeros((2, 20000)), release, task.stream())
    assert noise.std() == pytest.approx(3.0 * release.noise_multiplier, rel=0.02)  # 2 % is four standard errors


def test_another_seed_draws_other_noise() -> None:
    task = task_of()
    first, second = (replace(task, seed=seed).stream().normal("sum", 0, 1000) for seed in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_labels_follow_the_frequencies() -> None:
    labels = labels_like(np.array([1.0, 3.0, 0.0]), 1000)
    assert len(labels) == 1000
    assert np.bincount(labels, minlength=3) == pytest.approx(np.array([250, 749, 1]), abs=1)


def test_the_rows_of_a_patient_are_their_own_images() -> None:
    task = task_of(images_each=3)
    rows = images_in_turn(task.training.rows_of(), np.array([2, 5]), [1, 2], 4)
    assert task.training.patients[rows].tolist() == [2] * 4 + [5] * 4
    assert set(rows[:4]) == {6, 7, 8}


def exact(mean: np.ndarray, stddev: np.ndarray) -> np.ndarray:
    """Rows whose sample mean and covariance are exactly the given mean and diagonal."""
    x = np.random.default_rng(1).normal(size=(200, len(mean)))
    x = x - x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return white * stddev + mean


def test_frechet_distance_is_the_closed_form_of_gaussians() -> None:
    first = exact(np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 0.5]))
    second = exact(np.array([1.0, 1.0, 0.0]), np.array([3.0, 2.0, 0.0]))  # of lower rank
    assert frechet_distance(first, second) == pytest.approx(1 + 4 + (1 - 3) ** 2 + 0.5**2, abs=1e-6)


def test_frechet_distance_knows_covariances_that_lie_askew() -> None:
    first = exact(np.zeros(2), np.array([3.0, 0.5]))
    second = first @ np.array([[0.6, 0.8], [-0.8, 0.6]])
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))  # trace of the root of a 2x2 matrix with eigenvalues >= 0
    assert frechet_distance(first, second) == pytest.approx(np.trace(a + b) - 2 * root, rel=1e-6)


def test_frechet_distance_of_a_set_with_itself_is_zero_even_with_fewer_rows_than_columns() -> None:
    x = np.random.default_rng(2).normal(size=(40, 100))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-4)  # of a trace of 200
    turned = np.linalg.qr(np.random.default_rng(3).normal(size=(100, 100)))[0]
    assert frechet_distance(x @ turned, 2 * x @ turned) == pytest.approx(frechet_distance(x, 2 * x), rel=1e-6)


@pytest.mark.parametrize("shape", [(28, 28), (64, 64), (28, 28, 28)])
def test_the_second_extractor_does_not_reward_blur(shape: tuple[int, ...]) -> None:
    images = phantom_images(anatomies=("chest",), num_images=400, spatial_shape=shape, channels=1, num_classes=2, seed=4)[0]
    first, second = images[:200], images[200:]
    level = GenerateConfig().sigma_min
    noisy = np.clip(second + level * np.random.default_rng(5).normal(size=second.shape), -1, 1).astype(np.float32)
    blurred = np.asarray(gaussian_filter(second, (0, 0, *(1 for _ in shape))), dtype=np.float32)
    for distance in (frechet_distance, kid):
        same, blur, noise = (distance(descriptors(first), descriptors(x)) for x in (second, blurred, noisy))
        assert blur - same > 1.3 * (noise - same) > 0


def test_worst_recall_is_that_of_the_class_which_is_missed_most() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]])
    assert worst_recall(probabilities, np.array([0, 0, 1, 1])) == 0.5
    assert worst_recall(probabilities, np.array([0, 1, 1, 1])) == pytest.approx(2 / 3)
