"""Images drawn coarse and enlarged: halving is the mean, an image keeps what it was, and only public images teach the enlarger."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpsynth.config import Config, GenerateConfig, halvings, parse_config
from dpsynth.data.halve import halved
from dpsynth.data.phantom import phantom_images
from dpsynth.errors import ConfigError
from dpsynth.generate import image_seeds
from dpsynth.model.enlarger import LARGEST, SMALLEST, Enlarger
from dpsynth.model.generator import Generator
from dpsynth.model.moments import frequencies, to_frequencies
from dpsynth.progress import silent
from dpsynth.train.pretrain_enlarger import pretrained_enlargers
from tests.model.test_denoiser_and_sampler import moments


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((28, 28), 0), ((48, 200), 0), ((56, 56), 1), ((60, 60), 1), ((116, 116), 1), ((64, 64), 1), ((64, 96), 1), ((128, 128), 2),
        ((224, 224), 3), ((24, 28, 28), 0), ((28, 28, 28), 1), ((32, 48, 32), 1), ((64, 64, 64), 2), ((256, 256, 256), 4),
    ],
)  # fmt: skip
def test_sides_are_halved_to_what_can_be_learnt(shape: tuple[int, ...], expected: int) -> None:
    assert halvings(shape) == expected
    assert all(side % 2**expected == 0 for side in shape)


@pytest.mark.parametrize("shape", [(3, 1, 8, 16), (2, 3, 8, 8), (2, 1, 8, 16, 24)])
def test_halving_is_the_mean_and_looks_at_one_image_alone(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    found = halved(images, 2)
    assert found.shape == (*shape[:2], *(side // 4 for side in shape[2:]))
    corner = images[(..., *(slice(4) for _ in shape[2:]))]
    np.testing.assert_allclose(found[(..., *(0 for _ in shape[2:]))], corner.reshape(*shape[:2], -1).mean(2), atol=1e-6)
    np.testing.assert_array_equal(halved(images[1:], 2), found[1:])
    assert halved(images, 0) is images


def configuration(size: int = 56, *, steps: int = 2, cache: Path | None = None, method: str = "diffusion") -> Config:
    text = f"method: {method}\ndata: {{spatial_shape: [{size}, {size}]}}\npretrain: {{steps: {steps}, batch_size: 16, num_phantoms: 60}}"
    config = parse_config(text, base=Path.cwd())
    return config.model_copy(update={"pretrain": config.pretrain.model_copy(update={"cache": cache})})


def public(size: int, count: int = 60) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return phantom_images(anatomies=("chest",), num_images=count, spatial_shape=(size, size), channels=1, num_classes=2, seed=0)[0]


def test_low_frequencies_must_fit_what_is_learnt_from() -> None:
    text = "method: {}\ndata: {{spatial_shape: [56, 56]}}\nmoments: {{low_frequencies: 40}}"
    with pytest.raises(ConfigError, match="low_frequencies"):
        parse_config(text.format("diffusion"), base=Path.cwd())
    assert parse_config(text.format("moments"), base=Path.cwd()).halvings == 0


@pytest.mark.parametrize("shape", [(4, 1, 8, 16), (2, 3, 8, 8), (2, 2, 4, 8, 8)])
def test_cells_are_split_into_mean_and_detail_without_loss(shape: tuple[int, ...]) -> None:
    images = torch.from_numpy(np.random.default_rng(2).uniform(-1, 1, shape).astype(np.float32))
    enlarger = Enlarger(channels=shape[1], dimensions=len(shape) - 2)
    coarse, detail = enlarger.split(images)
    np.testing.assert_allclose(coarse.numpy(), halved(images.numpy()), atol=1e-6)
    torch.testing.assert_close(enlarger.join(coarse, detail), images, atol=1e-5, rtol=0)
    energy = coarse.square().sum() * 2 ** (len(shape) - 2) + detail.square().sum()
    assert float(energy) == pytest.approx(float(images.square().sum()), rel=1e-5)  # orthonormal


def test_a_fresh_enlarger_weighs_all_noise_levels_alike() -> None:
    torch.manual_seed(0)
    enlarger, clean = Enlarger(channels=1, dimensions=2), torch.randn(400, 1, 8, 8) * 0.1
    for sigma in (SMALLEST, 0.1, LARGEST):
        losses = enlarger.row_losses(clean, sigma=torch.full((400,), sigma), noise=torch.randn(400, 3, 4, 4))
        assert float(losses.detach().mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 12), (1, 8, 8, 8)])
def test_enlarged_images_have_twice_the_sides_keep_their_coarse_content_and_do_not_depend_on_their_batch(shape: tuple[int, ...]) -> None:
    images, seeds = np.random.default_rng(1).uniform(-0.4, 0.4, (6, *shape)).astype(np.float32), image_seeds(0, 6)
    enlarger = Enlarger(channels=shape[0], dimensions=len(shape) - 1)
    found = enlarger.enlarged(images, seeds, number=0, progress=silent)
    assert found.shape == (6, shape[0], *(2 * side for side in shape[1:]))
    np.testing.assert_allclose(halved(found), images, atol=1e-5)
    np.testing.assert_allclose(enlarger.enlarged(images[2:3], seeds[2:3], number=0, progress=silent), found[2:3], atol=1e-5)
    assert np.abs(enlarger.enlarged(images, seeds, number=1, progress=silent) - found).max() > 0.01  # another doubling, other noise


def test_a_generator_with_enlargers_draws_the_full_size_and_survives_being_stored(tmp_path: Path) -> None:
    torch.manual_seed(3)
    enlargers = tuple(Enlarger(channels=1, dimensions=2) for _ in range(2))
    for parameter in enlargers[1].parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    made = Generator(classes=("a", "b"), moments=moments((1, 8, 12)), denoiser=None, net_channels=(), texture=True, enlargers=enlargers)
    cells, seeds, settings = np.array([0, 1, 1]), image_seeds(0, 3), GenerateConfig(count=3)
    images = made.sample(cells, seeds, settings, progress=silent)
    assert images.shape[1:] == made.shape == (1, 32, 48)
    made.save(tmp_path)
    np.testing.assert_allclose(Generator.load(tmp_path).sample(cells, seeds, settings, progress=silent), images, atol=1e-5)
    small = replace(made, enlargers=()).sample(cells, seeds, settings, progress=silent)
    assert np.corrcoef(halved(images, 2).ravel(), small.ravel())[0, 1] > 0.99  # but for what was clamped


def test_it_learns_from_public_images_and_is_kept_for_equal_ones(tmp_path: Path) -> None:
    images = public(56)
    (first,) = pretrained_enlargers(configuration(cache=tmp_path), images, progress=silent)
    (again,) = pretrained_enlargers(configuration(cache=tmp_path), images, progress=silent)
    (other,) = pretrained_enlargers(configuration(cache=tmp_path), images[::-1].copy(), progress=silent)
    assert len(list(tmp_path.iterdir())) == 2
    one, two, three = (torch.cat([p.detach().flatten() for p in enlarger.parameters()]) for enlarger in (first, again, other))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert len(pretrained_enlargers(configuration(112, steps=0), public(112, 20), progress=silent)) == 2
    assert pretrained_enlargers(configuration(method="moments"), images, progress=silent) == ()


def test_what_it_draws_is_nearer_to_real_detail_than_interpolation() -> None:
    """Procedural people of 56 px from those of 28 px: energy in the finest rings of frequency, which interpolation lacks."""
    images = public(56, 300)
    (enlarger,) = pretrained_enlargers(configuration(steps=150), images[:200], progress=silent)
    coarse = halved(images[200:])
    drawn = enlarger.enlarged(coarse, image_seeds(0, 100), number=0, progress=silent)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse), scale_factor=2, mode="bicubic").numpy()
    band = frequencies((1, 56, 56), 12).band

    def fine(of: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> float:
        return float((to_frequencies(of)[:, band >= 8] ** 2).mean())

    assert abs(np.log(fine(drawn) / fine(images[200:]))) < 0.7 * abs(np.log(fine(smooth) / fine(images[200:])))
