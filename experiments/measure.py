"""The evaluator that experiments share: utility on real patients, and distance to real images by two declared extractors."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpsynth.checks.classifier import auc, balanced_accuracy, train_and_predict, worst_recall
from dpsynth.checks.features import encode
from dpsynth.checks.gaussian_distance import frechet_distance
from dpsynth.checks.statistics import kid, neighbourhoods
from dpsynth.config import Config
from dpsynth.data.cohort import Float32, ImageSet, Int64
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.model.descriptors import descriptors
from dpsynth.progress import silent

Array = NDArray[np.float64]
SAMPLE = 1500  # images a side of every fidelity figure
CLASSIFIERS = 3


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
    ours_by_band, theirs_by_band = descriptors(against), descriptors(other)
    return {
        **(utility(images, labels, test, len(training.classes), seed) if len(training.classes) > 1 else {}),
        "kid": kid(ours[: len(theirs)], theirs),
        "fd": frechet_distance(ours, theirs),
        "kid_bands": kid(ours_by_band[: len(theirs)], theirs_by_band),
        "fd_bands": frechet_distance(ours_by_band, theirs_by_band),
        **neighbourhoods(ours, theirs).__dict__,
    }


def utility(images: Float32, labels: Int64, test: tuple[Float32, Int64], classes: int, seed: int) -> dict[str, float]:
    """Of classifiers trained on the images and tested on others: the mean over CLASSIFIERS, whose own chance moves an AUC by 0.01."""
    found = []
    for number in range(CLASSIFIERS):
        probabilities = train_and_predict(images, labels, test[0], classes=classes, seed=seed + 1000 * number, task="", progress=silent)
        found.append([measure(probabilities, test[1]) for measure in (auc, balanced_accuracy, worst_recall)])
    return dict(zip(("auc", "balanced_accuracy", "worst_recall"), np.mean(found, axis=0).tolist(), strict=True))


def features(images: Float32) -> Array:
    """Encoder features."""
    return encode(images, task="", progress=silent)
