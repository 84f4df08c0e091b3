"""Closed forms: the Wiener filter is the Gaussian posterior, a fresh denoiser is the filter, the sampler solves its equation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest, truncnorm

from dpsynth.cells import Cells
from dpsynth.config import GenerateConfig, packing
from dpsynth.errors import ArtifactError
from dpsynth.generate import draw, image_seeds, mixed_cells
from dpsynth.model.denoiser import Denoiser, noise_levels, stratified_normal
from dpsynth.model.generator import SETTINGS, WEIGHTS, Generator
from dpsynth.model.moments import Moments, frequencies, from_frequencies, to_frequencies
from dpsynth.model.packing import depth_to_space, space_to_depth
from dpsynth.model.sampler import schedule, solve, starting_noise
from dpsynth.model.votes import Parents
from dpsynth.model.wiener import WienerFilter
from dpsynth.progress import silent

SHAPES = [(1, 8, 12), (2, 8, 8), (1, 4, 4, 8)]


def moments(shape: tuple[int, ...], classes: int = 2, seed: int = 0) -> Moments:
    rng, layout = np.random.default_rng(seed), frequencies(shape, 3)
    low, size = len(layout.low), int(np.prod(shape))
    roots = rng.normal(size=(classes, low, low)) * 0.3
    return Moments(
        shape=shape,
        low_frequencies=3,
        counts=np.ones(classes),
        mean=rng.normal(size=(classes, low)),
        covariance=roots @ roots.transpose(0, 2, 1),
        variance=rng.uniform(0.01, 0.3, (classes, size)),
    )


def dense(known: Moments, label: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the pixels, by plain linear algebra."""
    size = int(np.prod(known.shape))
    layout = frequencies(known.shape, known.low_frequencies)
    covariance = np.diag(known.variance[label])
    covariance[np.ix_(layout.low, layout.low)] = known.covariance[label]
    mean = np.zeros(size)
    mean[layout.low] = known.mean[label]
    basis = from_frequencies(np.eye(size), known.shape).reshape(size, size).T.astype(np.float64)
    return basis @ mean, basis @ covariance @ basis.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigma", [0.01, 0.5, 20.0])
def test_the_filter_is_the_posterior_of_a_gaussian(shape: tuple[int, ...], sigma: float) -> None:
    known = moments(shape)
    noisy = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 1, 0])
    found, error = WienerFilter(known)(noisy, torch.full((4,), sigma), labels)
    for row, label in enumerate(labels.tolist()):
        mean, covariance = dense(known, label)
        gain = covariance @ np.linalg.inv(covariance + sigma**2 * np.eye(len(mean)))
        expected = mean + gain @ (noisy[row].numpy().ravel() - mean)
        assert np.abs(found[row].numpy().ravel() - expected).max() < 1e-3
        left = covariance - gain @ covariance
        assert float(error[row]) == pytest.approx(np.sqrt(np.trace(left) / len(mean)), rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_noisy_images_have_the_mean_and_covariance_of_their_class_and_of_the_noise(shape: tuple[int, ...]) -> None:
    known, size, sigma = moments(shape), int(np.prod(shape)), 0.7
    for label in (0, 1):
        basis = torch.cat([torch.zeros(1, size), torch.eye(size)]).view(-1, *shape)
        found = WienerFilter(known).noisy_images(basis, sigma, torch.full((size + 1,), label)).flatten(1).double().numpy()
        mean, covariance = dense(known, label)
        assert np.abs(found[0] - mean).max() < 1e-5
        root = (found[1:] - found[0]).T  # linear in the normal numbers
        assert np.abs(root @ root.T - covariance - sigma**2 * np.eye(size)).max() < 1e-4


def test_another_machine_draws_the_same_noisy_images(other_signs: Callable[[], None]) -> None:
    normal, labels = torch.randn(3, 1, 8, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1])
    here = WienerFilter(moments((1, 8, 12))).noisy_images(normal, 0.7, labels)
    other_signs()
    assert torch.allclose(WienerFilter(moments((1, 8, 12))).noisy_images(normal, 0.7, labels), here, atol=1e-5)


def test_noisy_images_are_where_the_flow_of_the_filter_leads() -> None:
    known = moments((1, 8, 12))
    wiener, labels = WienerFilter(known), torch.tensor([0, 1, 1])
    normal = torch.randn(3, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    levels = schedule(400, sigma_min=0.5, sigma_max=20.0)[:-1]
    x = wiener.noisy_images(normal, 20.0, labels)
    for now, then in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        half = (now + then) / 2

        def slope(at: torch.Tensor, sigma: float) -> torch.Tensor:
            return (at - wiener(at, torch.full((3,), sigma), labels)[0]) / sigma

        x = x + (then - now) * slope(x + (half - now) * slope(x, now), half)
    assert float((x - wiener.noisy_images(normal, 0.5, labels)).abs().max()) < 5e-3


@pytest.mark.parametrize("largest", [0.5, 2.5])
def test_training_levels_are_log_normal_between_their_ends(largest: float) -> None:
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    found = noise_levels(normal, smallest=0.05, largest=largest)
    assert found.dtype == normal.dtype
    assert float(found.min()) >= 0.05
    assert float(found.max()) <= largest
    ends = [(np.log(end) + 1.0) / 1.3 for end in (0.05, largest)]
    assert kstest(found.log(), truncnorm(*ends, loc=-1.0, scale=1.3).cdf).pvalue > 1e-3
    assert bool(torch.isfinite(noise_levels(torch.tensor([-40.0, 40.0]), smallest=0.05, largest=largest)).all())


@pytest.mark.parametrize(("shape", "largest"), [((1, 8, 8), 0.5), ((1, 8, 8, 8), 2.5)])
def test_above_its_largest_level_the_denoiser_is_the_filter_of_the_moments(shape: tuple[int, ...], largest: float) -> None:
    made = generator(shape).denoiser
    assert made is not None
    noisy, labels = torch.randn(3, *shape), torch.tensor([0, 1, 1])
    sigma = torch.tensor([largest, 1.01 * largest, 5.0])
    difference = (made(noisy, sigma, labels) - made.wiener(noisy, sigma, labels)[0]).detach().abs().flatten(1).amax(1)
    assert float(difference[0]) > 1e-3
    assert torch.equal(difference[1:], torch.zeros(2))


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("shape", [(1, 8, 12), (3, 4, 4), (2, 4, 8, 12)])
def test_packing_loses_nothing_and_keeps_neighbours_together(shape: tuple[int, ...], factor: int) -> None:
    x = torch.randn(2, *shape)
    packed = space_to_depth(x, factor)
    assert packed.shape == (2, shape[0] * factor ** (len(shape) - 1), *(side // factor for side in shape[1:]))
    assert torch.equal(depth_to_space(packed, factor), x)
    corner = x[(0, 0, *(slice(0, factor) for _ in shape[1:]))].flatten().sort().values
    packed_corner = packed[(0, slice(0, factor ** (len(shape) - 1)), *(0 for _ in shape[1:]))].sort().values
    assert torch.equal(corner, packed_corner)


@pytest.mark.parametrize(
    ("space", "factor"),
    [
        ((8, 8), 2),
        ((28, 28), 2),
        ((32, 32), 2),
        ((36, 36), 2),
        ((40, 40), 4),
        ((64, 64), 4),
        ((128, 128), 8),
        ((224, 224), 8),
        ((100, 100), 8),
        ((16, 16, 16), 2),
        ((28, 28, 28), 4),
        ((64, 64, 64), 8),
        ((64, 28), 2),
    ],
)
def test_every_size_is_packed_to_few_positions(space: tuple[int, ...], factor: int) -> None:
    assert packing(space) == factor


@pytest.mark.parametrize("shape", [(1, 12, 20), (1, 8, 12, 16)])
def test_a_size_that_the_net_cannot_halve_is_padded_and_cut(shape: tuple[int, ...]) -> None:
    denoiser = Denoiser(moments(shape), channels=(8, 8, 16))  # 12 and 20 are no multiples of 2 * 2 * 2
    with torch.no_grad():
        for parameter in denoiser.net.parameters():
            parameter += 0.02
    noisy, sigma, labels = torch.randn(2, *shape), torch.ones(2), torch.tensor([0, 1])
    found = denoiser(noisy, sigma, labels)
    assert found.shape == noisy.shape
    corner = noisy.clone()
    corner[(..., *(-1 for _ in shape[1:]))] += 1  # the edge that is repeated in the padding
    assert not torch.equal(denoiser(corner, sigma, labels), found)
    alone = torch.cat([denoiser(noisy[[row]], sigma[[row]], labels[[row]]) for row in range(2)])
    assert torch.allclose(alone, found, atol=1e-5)  # what is padded with is the image's own


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 8, 8, 8)])
def test_a_fresh_denoiser_is_the_filter_and_its_loss_is_one(shape: tuple[int, ...]) -> None:
    known = moments(shape)
    denoiser = Denoiser(known, channels=(8, 16))
    noisy, sigma, labels = torch.randn(3, *shape), torch.tensor([0.1, 1.0, 5.0]), torch.tensor([0, 1, 0])
    assert torch.equal(denoiser(noisy, sigma, labels), WienerFilter(known)(noisy, sigma, labels)[0])
    rng = np.random.default_rng(1)
    mean, covariance = dense(known, 0)
    clean = rng.multivariate_normal(mean, covariance, size=600).reshape(600, *shape).astype(np.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        losses = denoiser.row_losses(
            torch.from_numpy(clean),
            torch.zeros(600, dtype=torch.int64),
            sigma=torch.full((600,), 0.7),
            noise=torch.randn(clean.shape, generator=generator),
        )
    assert float(losses.mean()) == pytest.approx(1, abs=0.05)


def test_transplanting_changes_the_moments_and_keeps_the_weights() -> None:
    denoiser = Denoiser(moments((1, 8, 8)), channels=(8, 16))
    before = {name: value.clone() for name, value in denoiser.net.state_dict().items()}
    other = moments((1, 8, 8), seed=5)
    denoiser.transplant(other)
    assert all(torch.equal(before[name], value) for name, value in denoiser.net.state_dict().items())
    noisy, sigma, labels = torch.randn(2, 1, 8, 8), torch.ones(2), torch.tensor([0, 1])
    assert torch.equal(denoiser(noisy, sigma, labels), WienerFilter(other)(noisy, sigma, labels)[0])


def test_the_draws_of_a_patient_are_spread_and_each_is_normal() -> None:
    """One of four in each quarter, in any order; and the draw at any one place is standard normal (Kolmogorov and Smirnov)."""
    found = stratified_normal(4000, 4, torch.Generator().manual_seed(3)).view(4000, 4)
    quarters = (torch.special.ndtr(found.double()) * 4).long()
    assert torch.equal(quarters.sort(dim=1).values, torch.arange(4).expand(4000, 4))
    assert all(kstest(found[:, place].numpy(), "norm").pvalue > 1e-4 for place in range(4))
    assert bool(torch.isfinite(stratified_normal(1, 1, torch.Generator().manual_seed(0))).all())


def test_the_small_trainable_set_is_small_and_holds_what_it_says() -> None:
    denoiser = Denoiser(moments((1, 8, 8)), channels=(16, 32))
    denoiser.set_trainable("small")
    free = {name for name, parameter in denoiser.net.named_parameters() if parameter.requires_grad}
    assert {"out.2.conv.weight", "out.2.conv.bias", "class_embedding.weight"} <= free
    count = sum(parameter.numel() for parameter in denoiser.net.parameters() if parameter.requires_grad)
    assert count < 0.1 * sum(parameter.numel() for parameter in denoiser.net.parameters())
    denoiser.set_trainable("all")
    assert all(parameter.requires_grad for parameter in denoiser.net.parameters())


MEAN, STDDEV = 0.3, 0.4


def gaussian_denoiser(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The posterior mean of N(MEAN, STDDEV^2) in every pixel."""
    variance = sigma.view(-1, 1, 1, 1) ** 2
    return (x * STDDEV**2 + MEAN * variance) / (STDDEV**2 + variance)


def test_the_sampler_solves_the_flow_of_a_gaussian() -> None:
    """For one Gaussian N(mean, s^2) the flow is known: x0 = mean + (x_T - mean) * s / sqrt(s^2 + T^2)."""
    start = torch.randn(3, 1, 4, 4) * 20.0
    expected = MEAN + (start - MEAN) * STDDEV / np.sqrt(STDDEV**2 + 20.0**2)
    error = {}
    for steps in (40, 80, 160):
        levels = schedule(steps, sigma_min=0.002, sigma_max=20.0)
        error[steps] = float((solve(gaussian_denoiser, start, torch.zeros(3, dtype=torch.int64), levels) - expected).abs().max())
    assert error[160] < 3e-3
    assert error[160] < error[80] / 3.3 < error[40] / 10  # second order: half the step, about a quarter of the error


def test_with_noise_on_the_way_the_images_have_the_distribution_of_the_gaussian() -> None:
    """From a start that is in place by its distribution alone: the mean of 40,000 pixels within five standard errors, their variance within
    the bias of finite steps; without the noise that belongs to a step, or with twice as much, the variance is far from it."""
    generator = torch.Generator().manual_seed(4)
    start = MEAN + torch.randn(2500, 1, 4, 4, generator=generator) * np.sqrt(STDDEV**2 + 2.0**2)
    labels, levels = torch.zeros(2500, dtype=torch.int64), schedule(80, sigma_min=0.01, sigma_max=2.0)

    def variance(part: float) -> float:
        drawn = solve(gaussian_denoiser, start, labels, levels, noise=lambda: part * torch.randn(start.shape, generator=generator))
        assert float(drawn.mean()) == pytest.approx(MEAN, abs=5 * STDDEV / 200)
        return float(drawn.var())

    assert variance(1.0) == pytest.approx(STDDEV**2, rel=0.05)
    assert variance(0.0) < 0.2 * STDDEV**2
    assert variance(2.0) > 2 * STDDEV**2


def test_the_schedule_goes_down_from_end_to_end() -> None:
    levels = schedule(9, sigma_min=0.06, sigma_max=20.0)
    assert float(levels[0]) == pytest.approx(20.0)
    assert float(levels[-2]) == pytest.approx(0.06)
    assert float(levels[-1]) == 0
    assert bool((levels.diff() < 0).all())


def generator(shape: tuple[int, ...] = (1, 8, 8), known: Moments | None = None) -> Generator:
    torch.manual_seed(0)
    known = known or moments(shape)
    denoiser = Denoiser(known, channels=(8, 16))
    for parameter in denoiser.net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return Generator(classes=("a", "b"), moments=known, denoiser=denoiser, net_channels=(8, 16), texture=False)


DRAW = GenerateConfig(count=5, steps=6)


def test_detail_comes_half_of_the_way_to_the_released_strength() -> None:
    known = moments((1, 12, 12))
    weak = replace(
        known, covariance=known.covariance / 50, mean=known.mean / 10, variance=known.variance / 50
    )  # so that nothing is clipped
    attributes = (("sex", ("F", "M")),)
    weak = replace(weak, **{name: np.repeat(getattr(weak, name), 2, axis=0) for name in ("counts", "mean", "covariance", "variance")})
    made = replace(generator(known=weak), attributes=attributes)
    loud = made.with_released_detail(DRAW, progress=silent)
    assert loud.gains is not None
    assert np.ptp(loud.gains) > 0.03, "the random net must draw some ring too weak or too strong for this to be a test"
    cells, seeds, layout = np.arange(400) % 4, image_seeds(7, 400), frequencies((1, 12, 12), 3)
    for value in (0, 1):
        away = []
        for one in (made, loud):
            energy = to_frequencies(one.sample(cells, seeds, DRAW, progress=silent)[cells // 2 == value]) ** 2
            rings = [np.log(energy[:, layout.band == b].mean() / weak.variance[2 * value, layout.band == b].mean()) for b in range(3)]
            away.append(np.array(rings))
        np.testing.assert_allclose(away[1], away[0] / 2, atol=0.1)
    again = loud.with_released_detail(DRAW, progress=silent).gains
    np.testing.assert_array_equal(again, loud.gains)
    assert replace(made, denoiser=None).with_released_detail(DRAW, progress=silent).gains is None


def test_an_image_depends_on_its_seed_and_label_and_on_no_other_image() -> None:
    made, seeds = generator().with_released_detail(DRAW, progress=silent), image_seeds(0, 5)
    labels = np.array([0, 1, 0, 1, 1])
    whole = made.sample(labels, seeds, DRAW, progress=silent)
    alone = made.sample(labels[3:4], seeds[3:4], DRAW, progress=silent)
    assert np.allclose(whole[3], alone[0], atol=1e-5)
    assert np.abs(whole[3] - whole[4]).max() > 0.05
    assert torch.equal(starting_noise(seeds, (1, 4, 4))[2], starting_noise(seeds[2:], (1, 4, 4))[0])


PARENTS = Parents(
    images=np.stack([np.full((1, 8, 8), level, dtype=np.float32) for level in (-0.9, 0.0, 0.9)]),
    cells=np.array([0, 0, 1]),
    weights=np.array([1.0, 3.0, 2.0]),
)


def test_images_are_drawn_around_the_parent_of_their_own_cell() -> None:
    wide = replace(moments((1, 8, 8)), covariance=np.tile(np.eye(9), (2, 1, 1)), variance=np.ones((2, 64)))  # pulls no image to its mean
    made, cells, seeds = generator(known=wide), np.array([0, 1] * 20), image_seeds(0, 40)
    images = replace(made, parents=PARENTS).sample(cells, seeds, DRAW, progress=silent)
    chosen = PARENTS.choose(cells, seeds)
    distances = np.stack([np.abs(images - parent).mean((1, 2, 3)) for parent in PARENTS.images])
    assert (distances[:, cells == 1].argmin(0) == 2).all()
    assert (distances.argmin(0) == chosen).mean() > 0.95
    alone = replace(made, parents=PARENTS).sample(cells[7:8], seeds[7:8], DRAW, progress=silent)
    assert np.allclose(images[7], alone[0], atol=1e-5)
    orphan = replace(PARENTS, images=PARENTS.images[:2], cells=PARENTS.cells[:2], weights=PARENTS.weights[:2])
    mixed = replace(made, parents=orphan).sample(cells, seeds, DRAW, progress=silent)
    assert np.allclose(mixed[cells == 0], images[cells == 0], atol=1e-5)
    assert np.allclose(mixed[cells == 1], made.sample(cells, seeds, DRAW, progress=silent)[cells == 1], atol=1e-5)


@pytest.mark.parametrize("diffusion", [True, False])
def test_a_saved_generator_draws_the_same_images(tmp_path: Path, diffusion: bool) -> None:
    made = replace(generator(), parents=PARENTS).with_released_detail(DRAW, progress=silent)
    if not diffusion:
        made = Generator(classes=made.classes, moments=made.moments, denoiser=None, net_channels=(), texture=True)
    made.save(tmp_path)
    first, second = draw(made, DRAW, progress=silent), draw(Generator.load(tmp_path), DRAW, progress=silent)
    assert np.array_equal(first.images, second.images)
    assert np.array_equal(first.labels, second.labels)


@pytest.mark.parametrize("name", [SETTINGS, WEIGHTS])
def test_a_broken_generator_is_named(tmp_path: Path, name: str) -> None:
    generator().save(tmp_path)
    content = (tmp_path / name).read_bytes()
    for broken in (content[: len(content) // 2], b"", content.replace(b'"schema": 1', b'"schema": 9')):
        if broken != content:
            (tmp_path / name).write_bytes(broken)
            with pytest.raises(ArtifactError):
                Generator.load(tmp_path)


@pytest.mark.parametrize("mix", ["balanced", "noisy_prior"])
@pytest.mark.parametrize("count", [1, 7, 100])
def test_labels_are_mixed_as_asked(mix: str, count: int) -> None:
    labels = mixed_cells(GenerateConfig(count=count, label_mix=mix), np.array([0.7, 0.2, 0.1]), Cells(classes=("a", "b", "c")))
    assert len(labels) == count
    shares = np.bincount(labels, minlength=3) / count
    expected = [1 / 3] * 3 if mix == "balanced" else [0.7, 0.2, 0.1]
    assert np.abs(shares - expected).max() <= 1 / count


def test_seeds_are_distinct_and_do_not_depend_on_how_many_are_drawn() -> None:
    assert len(set(image_seeds(0, 2000).tolist())) == 2000
    assert np.array_equal(image_seeds(0, 2000)[:10], image_seeds(0, 10))
    assert not set(image_seeds(0, 100).tolist()) & set(image_seeds(1, 100).tolist())


def test_samples_stay_in_range() -> None:
    images = generator().sample(np.array([0]), image_seeds(0, 1), DRAW, progress=silent)
    assert images.min() >= -1
    assert images.max() <= 1
