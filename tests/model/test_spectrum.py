"""Detail nearer to the released strength: half of the way in logarithms, each ring and label by itself, nothing else is touched."""

from __future__ import annotations

import numpy as np
import pytest

from dpsynth.model.moments import frequencies, from_frequencies, ring_energies, to_frequencies
from dpsynth.model.spectrum import ring_gains, with_gains

LAYOUT = frequencies((1, 12, 12), 3)
LABELS = np.arange(4000) % 2


def images(energies: np.ndarray) -> np.ndarray:
    """Small Gaussian images of the two labels whose coefficients have these mean squares (labels, pixels): nothing is clipped."""
    normal = np.random.default_rng(0).normal(size=(len(LABELS), LAYOUT.band.size))
    return from_frequencies(normal * np.sqrt(energies[LABELS]), LAYOUT.shape)


def energies(of: np.ndarray, label: int, band: int) -> float:
    return float((to_frequencies(of[label == LABELS])[:, LAYOUT.band == band] ** 2).mean())


@pytest.mark.parametrize("weaker", [1.0, 4.0, 0.25])
def test_half_of_the_way_in_one_ring_of_one_label(weaker: float) -> None:
    released = np.random.default_rng(1).uniform(1e-3, 2e-3, (2, LAYOUT.band.size))
    drawn = released.copy()
    drawn[1, LAYOUT.band == 2] /= weaker
    before = images(drawn)
    gains = ring_gains(before, LABELS, ring_energies(released, LAYOUT)[LABELS], LAYOUT)
    after = with_gains(before, gains[LABELS], LAYOUT)
    for label in (0, 1):
        for band in range(LAYOUT.num_bands):
            changed = weaker ** (1 / 2) if (label, band) == (1, 2) else 1.0
            assert energies(after, label, band) / energies(before, label, band) == pytest.approx(changed, rel=0.05)
    low = to_frequencies(after)[:, LAYOUT.low], to_frequencies(before)[:, LAYOUT.low]
    np.testing.assert_allclose(*low, atol=1e-5)


def test_an_empty_ring_is_not_blown_up_and_images_stay_images() -> None:
    released = np.full((2, LAYOUT.band.size), 0.5)
    gains = ring_gains(images(1e-9 * released), LABELS, ring_energies(released, LAYOUT)[LABELS], LAYOUT)
    assert gains.max() == pytest.approx(9 ** (1 / 4))
    assert np.abs(with_gains(images(released), gains[LABELS], LAYOUT)).max() <= 1


def test_images_without_fine_detail_at_all() -> None:
    tiny = frequencies((1, 3, 3), 3)
    assert not (tiny.band >= 0).any()
    pictures = np.zeros((4, 1, 3, 3), dtype=np.float32)
    gains = ring_gains(pictures, np.array([0, 1, 0, 1]), np.zeros((4, tiny.num_bands)), tiny)
    np.testing.assert_array_equal(gains, 1)
    np.testing.assert_array_equal(with_gains(pictures, gains[[0, 1, 0, 1]], tiny), pictures)


def test_images_are_taken_a_few_at_a_time_and_nothing_depends_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    released = np.random.default_rng(2).uniform(1e-3, 2e-3, (2, LAYOUT.band.size))
    pictures, labels = images(released / 2)[:7], LABELS[:7]
    whole = ring_gains(pictures, labels, ring_energies(released, LAYOUT)[labels], LAYOUT)
    loud = with_gains(pictures, whole[labels], LAYOUT)
    monkeypatch.setattr("dpsynth.model.moments._AT_ONCE", 3 * 144)
    np.testing.assert_allclose(ring_gains(pictures, labels, ring_energies(released, LAYOUT)[labels], LAYOUT), whole)
    np.testing.assert_allclose(with_gains(pictures, whole[labels], LAYOUT), loud, atol=1e-6)
