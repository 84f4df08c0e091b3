"""Small cells: with pooling their moments are nearer to the truth than without, and large cells keep what is their own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsynth.config import DataConfig
from dpsynth.data.attributes import by_cell
from dpsynth.data.phantom import phantom_images
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.model import moment_release as release
from dpsynth.model.moment_release import moment_queries, release_moments
from dpsynth.model.moments import Moments, PublicReference, public_reference
from dpsynth.model.pooling import Variances, consistent_counts, joined_sum, pooled_covariances, pooled_means
from dpsynth.privacy.mechanism import MomentRelease
from dpsynth.privacy.noise import NoiseStream
from dpsynth.progress import silent

LABELS = np.array([0, 0, 0, 1, 1, 1])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-50, 500), min_size=1, max_size=12).map(np.array), st.floats(1, 20))
def test_consistent_counts_are_the_nearest_of_all(noised: np.ndarray, smallest: float) -> None:
    counts = consistent_counts(noised, smallest)
    total = max(noised.sum(), smallest)
    assert counts.min() >= 0
    assert counts.sum() == pytest.approx(total)
    rng = np.random.default_rng(0)
    for other in rng.dirichlet(np.full(len(noised), 0.5), 50) * total:
        assert np.linalg.norm(noised - counts) <= np.linalg.norm(noised - other) + 1e-6


def drawn_sums(counts: np.ndarray, spread: float, stddev: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(means, noised sums) of the model that the estimate is made for."""
    means = rng.normal(size=(2, 1, 30)) + np.sqrt(spread) * rng.normal(size=(2, 3, 30))
    means = means.reshape(6, 30)
    return means, counts[:, None] * means + stddev * rng.normal(size=(6, 30))


@pytest.mark.parametrize("spread", [0.0, 0.05, 4.0])
@pytest.mark.parametrize("stddev", [0.1, 3.0, 40.0])
def test_pooled_means_beat_own_means_and_label_means(spread: float, stddev: float) -> None:
    counts = np.array([300.0, 40.0, 4.0, 100.0, 0.0, 10.0])
    variances = Variances(noise=np.full(30, stddev**2), scatter=np.zeros(30), shape=np.ones(30))
    errors = []
    for seed in range(40):
        means, sums = drawn_sums(counts, spread, stddev, np.random.default_rng(seed))
        label = np.stack([sums[rows].sum(0) / counts[rows].sum() for rows in (slice(3), slice(3, 6))])[LABELS]
        estimates = (pooled_means(sums, counts, LABELS, variances), sums / np.maximum(counts, 1)[:, None], label)
        errors.append([((estimate - means)[counts > 0] ** 2).sum() for estimate in estimates])
    pooled, own, label_only = np.mean(errors, axis=0)
    assert pooled <= 1.02 * min(own, label_only)
    if stddev == 40.0 and spread == 0.05:
        assert pooled < 0.1 * own
    if stddev == 0.1 and spread == 4.0:
        assert pooled < 0.6 * label_only


def test_an_empty_cell_has_its_label_s_mean_and_a_large_one_its_own() -> None:
    counts = np.array([0.0, 5000.0, 5000.0, 5000.0, 5000.0, 5000.0])
    means, sums = drawn_sums(counts, 0.01, 1.0, np.random.default_rng(0))
    found = pooled_means(sums, counts, LABELS, Variances(noise=np.ones(30), scatter=np.full(30, 0.1), shape=np.ones(30)))
    assert np.allclose(found[1:], means[1:], atol=0.01)
    assert np.allclose(found[0], means[1:3].mean(0), atol=0.05)
    total, count = joined_sum(sums[:3], counts[:3])
    assert np.allclose(total / count, means[1:3].mean(0), atol=0.01)
    nothing = pooled_means(np.zeros((6, 30)), np.zeros(6), LABELS, Variances(noise=np.zeros(30), scatter=np.zeros(30), shape=np.ones(30)))
    assert np.array_equal(nothing, np.zeros((6, 30)))


def test_a_covariance_that_drowned_is_the_label_s_and_not_nothing() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(10, 10))
    truth, counts = root @ root.T / 10, np.array([2000.0, 1000.0, 3.0, 2000.0, 500.0, 2.0])
    noise = rng.normal(size=(6, 10, 10)) * 20
    totals = counts[:, None, None] * truth + (noise + noise.transpose(0, 2, 1)) / 2
    found = pooled_covariances(totals, counts, LABELS, stddev=20.0, prior=np.eye(10))
    assert np.linalg.eigvalsh(found).min() > -1e-9
    for cell in range(6):
        assert np.linalg.norm(found[cell] - truth) < 0.2 * np.linalg.norm(truth), cell
    own = np.array([2000.0, 1000.0, 3.0, 2000.0, 5000.0, 2.0])
    totals = own[:, None, None] * np.stack([truth] * 4 + [3 * truth] + [truth])
    found = pooled_covariances(totals, own, LABELS, stddev=1.0, prior=np.eye(10))
    assert np.linalg.norm(found[4] - 3 * truth) < 0.05 * np.linalg.norm(truth)


@pytest.fixture(scope="module")
def phantoms() -> tuple[DataConfig, PublicReference, Moments]:
    """A cohort with cells of 6 to 60 patients, the public constants, and the truth from ten times as many patients."""
    config = attributes_config(600)
    public = phantom_images(num_images=400, spatial_shape=(16, 16), channels=1, num_classes=2, seed=0)[0]
    reference = public_reference(public, low_frequencies=6)
    return config, reference, moments(attributes_config(4000), reference, None, None, 0)


def attributes_config(patients: int) -> DataConfig:
    return DataConfig.model_validate(
        {
            "attributes": {"sex": ["F", "M"], "site": ["A", "B"], "age": {"column": "age_years", "bands": [0, 40, 70, 120]}},
            "spatial_shape": (16, 16),
            "phantom": {"num_patients": patients, "max_images": 1},
        }
    )


def moments(
    config: DataConfig, reference: PublicReference, mechanism: MomentRelease | None, labels: np.ndarray | None, key: int
) -> Moments:
    images = by_cell(prepare(read_cohort(config), config, progress=silent), config)
    stream = None if mechanism is None else NoiseStream(key=bytes([key]) * 32)
    return release_moments(
        images.images, images.labels, images.patients, num_classes=len(config.cells), mechanism=mechanism, reference=reference,
        stream=stream, labels_of_cells=labels,
    )  # fmt: skip


@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0])
def test_small_cells_of_a_cohort_are_nearer_to_the_truth(
    noise_multiplier: float, phantoms: tuple[DataConfig, PublicReference, Moments], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, reference, truth = phantoms
    labels = config.cells.labels(np.arange(24))
    mechanism = MomentRelease(noise_multiplier=noise_multiplier, queries=moment_queries(reference))
    errors = {}
    for name in ("pooled", "own"):
        found = moments(config, reference, mechanism, labels, 7)
        monkeypatch.setattr(release, "pooled_means", lambda sums, counts, *_: sums / np.maximum(counts, 1)[:, None])
        monkeypatch.setattr(release, "pooled_covariances", lambda totals, counts, *_, **__: totals / np.maximum(counts, 1)[:, None, None])
        errors[name] = np.array(
            [
                np.linalg.norm(found.mean - truth.mean),
                np.linalg.norm(found.covariance - truth.covariance),
                np.abs(np.log(found.variance.mean(1) / truth.variance.mean(1))).sum(),
            ]
        )
    assert (errors["pooled"] < 0.8 * errors["own"]).all(), errors
    assert noise_multiplier < 1 or errors["pooled"][0] < 0.4 * errors["own"][0], errors


@pytest.mark.parametrize("noise_multiplier", [0.1, 5.0, 200.0])
def test_whatever_the_noise_pooled_moments_are_usable(
    noise_multiplier: float, phantoms: tuple[DataConfig, PublicReference, Moments]
) -> None:
    config, reference, _ = phantoms
    config = attributes_config(60)
    mechanism = MomentRelease(noise_multiplier=noise_multiplier, queries=moment_queries(reference))
    found = moments(config, reference, mechanism, config.cells.labels(np.arange(24)), 1)
    assert all(np.isfinite(array).all() for array in found.to_arrays().values())
    assert np.linalg.eigvalsh(found.covariance).min() > -1e-6
    assert found.variance.min() >= 0
    assert found.counts.min() >= 0
    assert found.probabilities.min() > 0
    assert found.probabilities.sum() == pytest.approx(1)
