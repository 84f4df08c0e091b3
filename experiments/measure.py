"""The evaluator that experiments share: utility on real patients, and distance to real images by two declared extractors.

The second extractor exists because KID on ImageNet features rewards blur: log-energies of frequency bands fall without bound when detail
is smoothed away, and rise only a little under the noise that a sampler leaves.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dctn
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

from dpsynth.checks.classifier import auc, balanced_accuracy, train_and_predict
from dpsynth.checks.features import encode
from dpsynth.checks.statistics import kid, neighbourhoods
from dpsynth.config import Config
from dpsynth.data.cohort import Float32, ImageSet, Int64
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.progress import silent

Array = NDArray[np.float64]
SAMPLE = 1500  # images a side of every fidelity figure
_BANDS = 12
_PLACES = {2: (4, 7), 3: (3, 5)}  # by dimensions: blocks an axis, pixels of the thumbnail an axis
_FLOOR = 4e-4  # energy of a coefficient at noise of 0.02, below what 8 bits and JPEG leave: no band is better known than this


def data_folder() -> Path:
    """Where the real data sets lie; ends with one clear line when they do not."""
    folder = Path(os.environ.get("DPSYNTH_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")).resolve()
    if not (folder / "pneumoniamnist.npz").is_file():
        sys.exit("Set DPSYNTH_DATA to a folder with pneumoniamnist.npz, kermany_cxr/ and nih1000/ (sources: experiments/README.md).")
    return folder


def test_images(config: Config, control: ImageSet) -> tuple[Float32, Int64]:
    """Patients that no run trained on: the official test split where there is one, else the control patients."""
    if config.data.format != "medmnist":
        return control.images, control.labels
    data = config.data.model_copy(update={"medmnist_split": "test"})
    images = prepare(read_cohort(data), data, progress=silent)
    return images.images, images.labels


def measured(
    images: Float32,
    labels: Int64,
    training: ImageSet,
    test: tuple[Float32, Int64],
    rng: np.random.Generator,
    seed: int,
    *,
    real: bool = False,
) -> dict[str, float]:
    """Utility on test patients (where there is more than one class), and fidelity against one half of the training images (real: of
    the other half against it)."""
    order = rng.permutation(len(training.images))
    size = min(SAMPLE, len(order) // 2)
    against = training.images[order[:size]]
    other = images[order[size : 2 * size]] if real else images[rng.permutation(len(images))[:size]]
    ours, theirs = features(against), features(other)
    ours_by_band, theirs_by_band = band_features(against), band_features(other)
    return {
        **(utility(images, labels, test, len(training.classes), seed) if len(training.classes) > 1 else {}),
        "kid": kid(ours[: len(theirs)], theirs),
        "fd": frechet_distance(ours, theirs),
        "kid_bands": kid(ours_by_band[: len(theirs)], theirs_by_band),
        "fd_bands": frechet_distance(ours_by_band, theirs_by_band),
        **neighbourhoods(ours, theirs).__dict__,
    }


def utility(images: Float32, labels: Int64, test: tuple[Float32, Int64], classes: int, seed: int) -> dict[str, float]:
    """Of a classifier trained on the images and tested on others."""
    probabilities = train_and_predict(images, labels, test[0], classes=classes, seed=seed, task="", progress=silent)
    return {
        "auc": auc(probabilities, test[1]),
        "balanced_accuracy": balanced_accuracy(probabilities, test[1]),
        "worst_recall": worst_recall(probabilities, test[1]),
    }


def features(images: Float32) -> Array:
    """Encoder features."""
    return encode(images, task="", progress=silent)


def worst_recall(probabilities: Array, labels: Int64) -> float:
    """The smallest recall among the classes that occur in `labels` (n,). probabilities: (n, classes)."""
    predicted = probabilities.argmax(axis=1)
    return float(min((predicted[labels == label] == label).mean() for label in np.unique(labels)))


def frechet_distance(first: Array, second: Array) -> float:
    """Squared Frechet distance of the Gaussians fitted to (n, d) and (m, d) (Dowson and Landau 1982; Heusel et al. 2017).

    The trace of (A B)^(1/2) is that of (A^(1/2) B A^(1/2))^(1/2): symmetric, so eigenvalues are real whatever the rank.
    """
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    middle = root @ b @ root
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh((middle + middle.T) / 2), 0)).sum()
    return float(((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * shared)


def band_features(images: Float32) -> Array:
    """Second extractor, (n, 93) of images (n, channel, height, width) in [-1, 1], (n, 203) of volumes; no weights.

    Log-energies of 12 rings of the cosine transform; log-energies of Haar detail at two scales in 4 blocks an axis (volumes: 3), which
    places the detail; and a thumbnail of 7 pixels an axis (volumes: 5), which places light and shade. Numbers of natural size, so that
    none of the three parts drowns the others.
    """
    grey = images.mean(axis=1, dtype=np.float64)
    axes = tuple(range(1, grey.ndim))
    blocks, thumbnail = _PLACES[len(axes)]
    coefficients = dctn(grey, axes=axes, norm="ortho") ** 2
    radius = np.sqrt(sum(grid**2 for grid in np.meshgrid(*(np.arange(side) / side for side in grey.shape[1:]), indexing="ij")))
    ring = np.minimum((radius * _BANDS).astype(int), _BANDS - 1)
    rings = np.stack([coefficients[:, ring == band].mean(axis=1) for band in range(_BANDS)], axis=1)
    parts, coarse = [np.log(rings + _FLOOR) / 2], grey
    for _ in range(2):
        coarse, detail = _haar(coarse)
        parts.append(np.log(_pooled(detail, blocks) + _FLOOR) / 2)
    return np.concatenate([*parts, _pooled(grey, thumbnail)], axis=1)


def _haar(images: Array) -> tuple[Array, Array]:
    """Means and mean detail energy of cells of 2 an axis: (n, *sides) to two of (n, *sides/2)."""
    n, *sides = images.shape
    cells = images.reshape(n, *(part for side in sides for part in (side // 2, 2)))
    within = tuple(2 + 2 * axis for axis in range(len(sides)))
    return cells.mean(axis=within), cells.var(axis=within)


def _pooled(images: Array, side: int) -> Array:
    pool = adaptive_avg_pool2d if images.ndim == 3 else adaptive_avg_pool3d
    return np.asarray(pool(torch.from_numpy(images)[:, None], side).flatten(1).numpy())
