"""The classifiers that several checks look at, each trained once: on synthetic images, on real ones, and on both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsynth.checks.classifier import train_and_predict
from dpsynth.checks.evidence import Evidence
from dpsynth.checks.kept import Arrays, Keep, keep_nothing
from dpsynth.progress import Progress

Array = NDArray[np.float64]
_CALIBRATION_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Arms:
    """Class probabilities (n, classes): of the control images by each arm, and of the synthetic images by the arm of real images."""

    synthetic: Array
    real: Array
    both: Array
    synthetic_by_real: Array


def impossible(evidence: Evidence) -> str:
    """Why no arm can be trained or tested, in one line; empty when all can."""
    for name, labels in (("synthetic images", evidence.synthetic_labels), ("control patients", evidence.control.labels)):
        counts = np.bincount(labels, minlength=len(evidence.control.classes))
        if counts.min() < 2:
            return f"a class has fewer than two {name}, so nothing can be trained or tested"
    return ""


def train_arms(evidence: Evidence, *, seed: int, progress: Progress, keep: Keep = keep_nothing) -> Arms:
    """Train all arms, from equal seeds."""
    control, classes = evidence.control.images, len(evidence.control.classes)
    real = evidence.training.images, evidence.training.labels
    synthetic = evidence.synthetic, evidence.synthetic_labels

    def predict(images: NDArray[np.float32], labels: NDArray[np.int64], test: NDArray[np.float32], task: str) -> Array:
        def make() -> Arrays:
            return {"rows": train_and_predict(images, labels, test, classes=classes, seed=seed, task=task, progress=progress)}

        return keep(f"classifier of {task}", make)["rows"]

    of_real = predict(*real, np.concatenate([control, evidence.synthetic]), "real images")
    together = np.concatenate([real[0], synthetic[0]]), np.concatenate([real[1], synthetic[1]])
    return Arms(
        synthetic=predict(*synthetic, control, "synthetic images"),
        real=of_real[: len(control)],
        both=predict(*together, control, "real and synthetic images"),
        synthetic_by_real=of_real[len(control) :],
    )


def brier(probabilities: Array, labels: NDArray[np.int64]) -> float:
    """Mean squared distance of the probabilities (n, classes) from the truth (Brier 1950), 0 to 2."""
    truth = np.eye(probabilities.shape[1])[labels]
    return float(((probabilities - truth) ** 2).sum(axis=1).mean())


def calibration_error(probabilities: Array, labels: NDArray[np.int64]) -> float:
    """Expected calibration error of the likeliest class, ten equal bins of confidence (Guo et al. 2017)."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * _CALIBRATION_BINS).astype(int), _CALIBRATION_BINS - 1)
    gaps = [abs(float(confidence[bins == b].mean()) - float(right[bins == b].mean())) * float((bins == b).mean()) for b in np.unique(bins)]
    return float(sum(gaps))
