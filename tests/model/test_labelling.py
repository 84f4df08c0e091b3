"""Labels given by released class means: what is kept, what is mended, and what is left alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from dpsynth.cells import Cells
from dpsynth.model import labelling as module
from dpsynth.model.descriptors import descriptors, public_descriptors
from dpsynth.model.labelling import Labelling, exchanged, label_queries, moved, release_labelling
from dpsynth.model.noised_sums import NoisedSums
from dpsynth.privacy.mechanism import MomentRelease
from dpsynth.privacy.noise import NoiseStream

TWO = Cells(classes=("smooth", "rough"))


def textures(labels: np.ndarray, seed: int, *, bright: np.ndarray | float = 0.0, side: int = 16) -> np.ndarray:
    """Blurred noise, label 1 with twice the fine detail; `bright` is added."""
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.normal(size=(len(labels), 1, side, side)), (0, 0, 1.5, 1.5))
    fine = 0.1 * rng.normal(size=smooth.shape) * (1 + labels[:, None, None, None])
    return np.clip(smooth + fine + np.reshape(bright, (-1, 1, 1, 1)), -1, 1).astype(np.float32)


RNG = np.random.default_rng(3)
LABELS = RNG.integers(0, 2, 600)
PRIVATE = textures(LABELS, 1, bright=0.2)
PUBLIC = public_descriptors(textures(RNG.integers(0, 2, 300), 2))


def released(images: np.ndarray = PRIVATE, labels: np.ndarray = LABELS, *, cells: int = 2, noise: float | None = None) -> Labelling:
    queries = label_queries(PUBLIC)
    queries = tuple(replace(query, share=query.share / sum(q.share for q in queries)) for query in queries)
    mechanism = None if noise is None else MomentRelease(noise_multiplier=noise, queries=queries)
    sums = NoisedSums(
        labels=labels, patients=np.arange(len(labels)), num_classes=cells, mechanism=mechanism,
        stream=None if noise is None else NoiseStream(key=b"k" * 32),
    )  # fmt: skip
    counts = np.bincount(labels, minlength=cells).astype(float)
    groups = np.arange(2).repeat(cells // 2)
    return release_labelling(images, sums, counts=counts, groups=groups, public=PUBLIC)


def test_class_means_without_noise_are_the_clipped_ones_around_the_private_mean() -> None:
    """The oracle knows nothing of pooling: without noise each class's mean is that of its own images."""
    rows = PUBLIC.shaped(descriptors(PRIVATE))
    counts = np.bincount(LABELS)
    masks = [label == LABELS for label in range(2)]
    # Classes weigh by their counts in the location (`joined_sum`), so do they here.
    location = np.average([rows[mask].mean(0) for mask in masks], axis=0, weights=counts**2)
    around = rows - location
    around *= np.minimum(1, PUBLIC.clip_norm / np.linalg.norm(around, axis=1))[:, None]
    expected = np.stack([around[mask].mean(0) for mask in masks])
    assert np.allclose(released().means, expected, atol=1e-8)


@pytest.mark.parametrize("noise", [1.0, 30.0, 1e4])
def test_means_lie_where_those_of_clipped_descriptors_can_however_loud_the_noise(noise: float) -> None:
    """Else a coordinator that leaves out impossible answers leaves out honest hospitals with few patients, by chance."""
    found = released(PRIVATE[:30], LABELS[:30], noise=noise)
    away = np.linalg.norm(found.location - PUBLIC.principal.shaped(PUBLIC.centre))
    assert away <= PUBLIC.clip_location * (1 + 1e-9)
    assert np.linalg.norm(found.means, axis=1).max() <= PUBLIC.clip_norm * (1 + 1e-9)


def wrong_half(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images of a generator that knows nothing of detail and takes brightness for the sign of its label: images, labels, true detail."""
    detail, given = np.random.default_rng(seed).integers(0, 2, (2, 700))
    return textures(detail, seed + 1, bright=0.2 + 0.1 * (2 * given - 1)), given, detail


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    return float((first == second).mean())


@pytest.mark.parametrize("noise", [None, 5.0])
def test_labels_come_to_mean_what_they_mean_in_private_images(noise: float | None) -> None:
    images, given, detail = wrong_half(5)
    found = released(noise=noise).labelled(images, given, TWO, seed=0)
    assert agreement(given, detail) < 0.55
    assert agreement(found, detail) > 0.7
    brightness = images.mean((1, 2, 3))
    gap = lambda labels: brightness[labels == 1].mean() - brightness[labels == 0].mean()  # noqa: E731
    assert gap(given) > 0.18
    assert abs(gap(found)) < 0.5 * gap(given)


def test_means_of_the_wrong_class_are_seen_in_the_labels() -> None:
    """The test above fails when classes are swapped on the way."""
    images, given, detail = wrong_half(5)
    right = released()
    swapped = replace(right, means=right.means[::-1])
    assert agreement(swapped.labelled(images, given, TWO, seed=0), detail) < 0.3


def test_a_faithful_generator_keeps_its_labels() -> None:
    labels = np.random.default_rng(8).integers(0, 2, 700)
    found = released().labelled(textures(labels, 9, bright=0.2), labels, TWO, seed=0)
    assert agreement(found, labels) > 0.95


def test_means_that_drown_in_noise_change_nothing() -> None:
    images, given, _ = wrong_half(5)
    assert agreement(released(noise=1e4).labelled(images, given, TWO, seed=0), given) == 1


def test_labels_whose_means_are_met_are_kept_to_the_last() -> None:
    rng = np.random.default_rng(4)
    labels, rows = rng.integers(0, 3, 900), rng.normal(size=(900, 4))
    met = np.stack([(rows - rows.mean(0))[labels == label].mean(0) for label in range(3)])
    assert np.array_equal(moved(rows, labels, met, np.zeros((3, 4))), np.eye(3)[labels])


def test_each_cell_occurs_as_often_as_before_and_attributes_stay() -> None:
    layout = Cells(classes=("smooth", "rough"), attributes=(("sex", ("F", "M", "unknown")),))
    sex = RNG.integers(0, 3, len(LABELS))
    model = released(PRIVATE, LABELS * 3 + sex, cells=6)
    images, given, detail = wrong_half(5)
    cells = given * 3 + np.random.default_rng(1).integers(0, 3, len(given))
    found = model.labelled(images, cells, layout, seed=0)
    assert np.array_equal(np.bincount(found, minlength=6), np.bincount(cells, minlength=6))
    assert np.array_equal(found % 3, cells % 3)
    assert agreement(found // 3, detail) > 0.65
    assert np.array_equal(found, model.labelled(images, cells, layout, seed=0))


@pytest.mark.parametrize("cells", [np.zeros(20, dtype=np.int64), np.arange(2), np.array([1])])
def test_few_images_or_one_label(cells: np.ndarray) -> None:
    found = released().labelled(PRIVATE[: len(cells)], cells, TWO, seed=0)
    assert sorted(found) == sorted(cells)


@pytest.mark.parametrize("ridge", [0.0, module._RIDGE])
def test_the_tilt_goes_towards_the_wanted_means_and_without_a_ridge_meets_them(monkeypatch: pytest.MonkeyPatch, ridge: float) -> None:
    monkeypatch.setattr(module, "_RIDGE", ridge)
    rng = np.random.default_rng(2)
    labels, rows = rng.integers(0, 3, 3000), rng.normal(size=(3000, 4))
    wanted = 0.3 * rng.normal(size=(3, 4))
    wanted -= np.bincount(labels) / 3000 @ wanted
    likely = moved(rows, labels, wanted, np.zeros((3, 4)))
    assert np.allclose(likely.sum(1), 1)
    assert np.allclose(likely.sum(0), np.bincount(labels), rtol=1e-3)
    reached = likely.T @ (rows - rows.mean(0)) / likely.sum(0)[:, None]
    assert (reached * wanted).sum() > 0.85 * np.linalg.norm(reached) * np.linalg.norm(wanted)
    if not ridge:
        assert np.abs(reached - wanted).max() < 0.04  # a standard error of 1,000 images
    uncertain = moved(rows, labels, wanted, np.full((3, 4), 10.0))
    assert np.abs(uncertain.T @ (rows - rows.mean(0)) / 1000).max() < 0.1


def test_an_exchange_is_the_best_in_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 4)
    scores = RNG.normal(size=(8, 2))
    labels = np.array([0, 0, 1, 1, 0, 1, 1, 1])
    found = exchanged(scores, labels)
    for block in (slice(0, 4), slice(4, 8)):
        difference, ones = (scores[:, 1] - scores[:, 0])[block], labels[block].sum()
        assert set(np.flatnonzero(found[block])) == set(np.argsort(-difference)[:ones])


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 14), (1, 4, 4), (1, 7, 9, 11), (1, 28, 28, 28)])
def test_descriptors_of_any_size_are_finite_and_few(shape: tuple[int, ...]) -> None:
    found = descriptors(np.random.default_rng(0).uniform(-1, 1, (3, *shape)).astype(np.float32))
    assert found.shape == (3, 93 if len(shape) == 3 else 191)
    assert np.isfinite(found).all()
    constant = descriptors(np.full((2, *shape), 1.0, dtype=np.float32))
    assert np.isfinite(public_descriptors(np.full((4, *shape), -1.0, dtype=np.float32)).shaped(constant)).all()
