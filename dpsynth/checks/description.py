"""What the images are like in numbers that inform and decide nothing, each beside real against real on equal numbers.

Real against real is control against training patients: what two honest halves of one hospital differ by.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics.regression import compute_ms_ssim
from numpy.typing import NDArray

from dpsynth.checks.evidence import Evidence, Features, first_images
from dpsynth.checks.gaussian_distance import frechet_distance
from dpsynth.checks.radiomics import NAMES, benjamini_hochberg, kolmogorov_smirnov, radiomics
from dpsynth.checks.statistics import kid
from dpsynth.data.cohort import Float32
from dpsynth.model.descriptors import descriptors, log_spectrum
from dpsynth.progress import Progress

Array = NDArray[np.float64]
MOST = 1000  # images a side
FALSE_DISCOVERIES = 0.05
_SMALLEST = 20
_KID_BLOCK = 50
_RESAMPLES = 400
_PAIRS = 200
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales (Wang, Simoncelli and Bovik 2003)
_KERNEL = 4  # the usual 11 needs more than 160 pixels at five scales
_NATS_TO_DB = 10 / np.log(10)


def describe(evidence: Evidence, features: Features, *, rng: np.random.Generator, progress: Progress) -> dict[str, float]:
    """Figures by name, for synthetic and for real images; empty when there are too few of either."""
    control, training = first_images(evidence.control), first_images(evidence.training)
    size = min(len(control), len(training), len(evidence.synthetic), MOST)
    if size < _SMALLEST:
        return {}
    against = rng.permutation(len(control))[:size]
    sides = {
        "synthetic": (evidence.synthetic, features.synthetic, rng.permutation(len(evidence.synthetic))[:size]),
        "real": (training, features.training, rng.permutation(len(training))[:size]),
    }
    figures: dict[str, float] = {}
    ours = _Look.of(control[against])
    for number, (name, (images, encoded, rows)) in enumerate(sides.items(), 1):
        found = {
            **_distances(features.control[against], encoded[rows], rng),
            **_appearance(ours, _Look.of(images[rows])),
            "MS-SSIM among pairs": diversity(images[rows], rng=rng),
        }
        figures |= {f"{key}, {name}": value for key, value in found.items()}
        progress("describe images", number, len(sides))
    return figures


def _distances(control: Array, other: Array, rng: np.random.Generator) -> dict[str, float]:
    value, limits = kid_interval(control, other, rng=rng)
    return {"KID": value, **dict(zip(("KID lower limit", "KID upper limit"), limits, strict=False))}


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What is compared of a set of images, computed once for each set."""

    images: Float32
    descriptors: Array
    spectrum: Array
    radiomics: Array

    @classmethod
    def of(cls, images: Float32) -> _Look:
        return cls(images=images, descriptors=descriptors(images), spectrum=log_spectrum(images).mean(axis=0), radiomics=radiomics(images))


def _appearance(control: _Look, other: _Look) -> dict[str, float]:
    statistic, p = kolmogorov_smirnov(control.radiomics, other.radiomics)
    return {
        "FD of bands": frechet_distance(control.descriptors, other.descriptors),
        "spectrum distance (dB)": float(np.sqrt(np.mean((control.spectrum - other.spectrum) ** 2)) * _NATS_TO_DB),
        "histogram distance": histogram_distance(control.images, other.images),
        f"radiomics that differ of {len(NAMES)}": float(benjamini_hochberg(p, FALSE_DISCOVERIES).sum()),
        **{f"KS of {name}": float(value) for name, value in zip(NAMES, statistic, strict=True)},
    }


def kid_interval(first: Array, second: Array, *, rng: np.random.Generator) -> tuple[float, tuple[float, float] | tuple[()]]:
    """Mean unbiased KID over disjoint blocks of 50 rows (one row a patient), with a 95 % interval by a bootstrap over the blocks; no
    interval when there are fewer than two blocks, which cannot differ.

    first, second: (n, d), equal n, of which each row is used once.
    """
    blocks = max(1, len(first) // _KID_BLOCK)
    order = rng.permutation(len(first)), rng.permutation(len(second))
    parts = [np.array_split(side, blocks) for side in order]
    values = np.array([kid(first[a], second[b]) for a, b in zip(*parts, strict=True)])
    if blocks < 2:
        return float(values[0]), ()
    means = values[rng.integers(blocks, size=(_RESAMPLES, blocks))].mean(axis=1)
    return float(values.mean()), (float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975)))


def histogram_distance(first: Float32, second: Float32) -> float:
    """Wasserstein distance of all intensities of two sets, in [-1, 1], by their 1st to 99th percentiles."""
    quantiles = np.linspace(0.01, 0.99, 99)
    a, b = (np.quantile(images, quantiles) for images in (first, second))
    return float(np.abs(a - b).mean())


def diversity(images: Float32, *, rng: np.random.Generator) -> float:
    """Mean MS-SSIM (kernel 4, as many scales as the size allows) of random pairs (n, channel, *space): higher means more alike."""
    first = rng.integers(len(images), size=_PAIRS)
    second = (first + rng.integers(1, len(images), size=_PAIRS)) % len(images)
    weights = scale_weights(min(images.shape[2:]))
    a, b = (torch.from_numpy(np.ascontiguousarray((images[rows] + 1) / 2)) for rows in (first, second))
    values = compute_ms_ssim(a, b, spatial_dims=images.ndim - 2, data_range=1.0, kernel_size=_KERNEL, weights=weights)
    return float(values.mean())


def scale_weights(side: int) -> tuple[float, ...]:
    """Weights of as many scales as MONAI allows for this smallest side, sum 1."""
    scales = max(s for s in range(1, len(_WEIGHTS) + 1) if s == 1 or side // (s - 1) ** 2 > _KERNEL - 1)
    total = sum(_WEIGHTS[:scales])
    return tuple(weight / total for weight in _WEIGHTS[:scales])
