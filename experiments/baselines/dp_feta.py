"""DP-FETA: warm start on noised central images, then DP-SGD (Gong et al. 2025).

Central images are noisy means of random groups of patients by class. Unlike in the paper the groups are disjoint, so one Gaussian
release of sums and counts covers all of them at the sensitivity of a single patient.
"""

from __future__ import annotations

import math

import numpy as np
from dpdm import CLIP_NORM, fit, sampling_probability
from edm import EdmDenoiser, fit_public
from numpy.typing import NDArray
from private import Clock, Made, Task, booked_sgd, labels_like, noised_sum, one_release
from scipy.ndimage import median_filter, zoom

from dpsynth.data.cohort import Float32, Int64
from dpsynth.model.noised_sums import patient_sum
from dpsynth.privacy.mechanism import MomentRelease

Array = NDArray[np.float64]
SHARE = 0.2  # of mu^2 for the central images
TYPICAL_PIXEL = 0.5  # root mean square of a pixel in [-1, 1] from which images are clipped; public
COUNT_WEIGHT = 0.3  # of the clip norm, for the count beside each sum
LARGEST_NOISE = 0.2  # wanted on a pixel of a central image; decides how many groups there are
FEWEST = 8  # groups of fewer patients by the noisy count are dropped
WARM_UP = 2  # steps on central images to one of DP-SGD


def dp_feta(task: Task) -> Made:
    """Train and draw labels as the noisy counts say."""
    clock = Clock()
    with clock.stage("rest"):
        release = one_release(task, clip_norm=query_norm(task.shape), share=SHARE)
        mechanism = booked_sgd(task, sampling_probability=sampling_probability(task), clip_norm=CLIP_NORM, before=(release,))
    with clock.stage("training"):
        images, labels, frequencies = central_images(task, release)
        denoiser = EdmDenoiser(task.shape, task.classes, seed=task.seed)
        fit_public(denoiser, images, labels, steps=WARM_UP * task.steps, seed=task.seed, augment=True)
        fit(denoiser, task, mechanism)
    with clock.stage("rest"):
        wanted = labels_like(frequencies)
        drawn = denoiser.draw(wanted, task.seed)
    return Made(images=drawn, labels=wanted, mechanisms=(release, mechanism), seconds=clock.seconds)


def image_norm(shape: tuple[int, ...]) -> float:
    """Clip norm of a halved image of `shape`."""
    return TYPICAL_PIXEL * math.sqrt(shape[0] * (shape[1] // 2) * (shape[2] // 2))


def query_norm(shape: tuple[int, ...]) -> float:
    """Clip norm of the vector (count, image) that a patient adds."""
    return image_norm(shape) * math.hypot(1, COUNT_WEIGHT)


def number_of_groups(task: Task, release: MomentRelease) -> int:
    """As many as keep the noise on a pixel of an average class at `LARGEST_NOISE`; from public numbers alone."""
    patients = LARGEST_NOISE * task.declared_patients / (task.classes * release.noise_stddev("sum"))
    return max(1, int(patients))


def group_sums(task: Task, groups: Int64, number: int) -> Array:
    """Sums over patients (classes * number, 1 + pixels) of (weighted count, clipped halved image). groups: of each patient."""
    halved = _halved(task.training.images).reshape(len(task.training.images), -1)
    norm = image_norm(task.shape)
    clipped = halved * np.minimum(1.0, norm / np.maximum(np.linalg.norm(halved, axis=1, keepdims=True), 1e-12))
    rows = np.concatenate([np.full((len(clipped), 1), COUNT_WEIGHT * norm), clipped], axis=1)
    cells = task.training.labels * number + groups[task.training.patients]
    return patient_sum(rows.__getitem__, cells, task.training.patients, task.classes * number, query_norm(task.shape))


def central_images(task: Task, release: MomentRelease) -> tuple[Float32, Int64, Array]:
    """Central images (n, *shape) of groups that are large enough, their labels, and noisy class counts (classes,)."""
    stream, number = task.stream(), number_of_groups(task, release)
    groups = (stream.uniform("groups", 0, task.training.num_patients) * number).astype(np.int64)
    noised = noised_sum(group_sums(task, groups, number), release, stream)
    counts = noised[:, 0] / (COUNT_WEIGHT * image_norm(task.shape))
    channels, height, width = task.shape
    means = (noised[:, 1:] / np.maximum(counts, 1)[:, None]).reshape(-1, channels, height // 2, width // 2)
    smooth = np.clip(median_filter(means, size=(1, 1, 3, 3), mode="nearest"), -1, 1)
    labels = np.repeat(np.arange(task.classes, dtype=np.int64), number)
    kept = counts >= FEWEST if (counts >= FEWEST).any() else counts >= counts.max()
    grown = np.clip(zoom(smooth[kept], (1, 1, 2, 2), order=1), -1, 1).astype(np.float32)
    return grown, labels[kept], np.maximum(counts.reshape(task.classes, number).sum(axis=1), 1)


def _halved(images: Float32) -> Array:
    n, c, h, w = images.shape
    return np.asarray(images.astype(np.float64).reshape(n, c, h // 2, 2, w // 2, 2).mean(axis=(3, 5)))
