"""Stage 1: class-wise moments under differential privacy, a generator of its own and the prior of the denoiser.

Images are taken to the orthonormal cosine domain. Of each class three noised sums are released, each query using the results of the
one before: count and sum of the low frequencies; second moments of their residuals; energies around the mean by ring of frequency.
A patient's contribution to a query is the mean over their images of class-indexed vectors that were clipped to the query's clip
norm, so by convexity it is never longer than the clip norm, whatever and however many the images are.
All constants (centre, clip norms, band scales) are computed on public images, never on private ones.
With attributes the classes are cells, and small ones lean on their label (`pooling`); the bound does not depend on what a class is.
Sources: Dwork et al. 2014 (Analyze Gauss) for noised second moments; Liew et al. 2022 for one-shot moments as generators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn, idctn

from dpsynth.model.pooling import Variances, consistent_counts, joined_sum, pooled_covariances, pooled_means
from dpsynth.privacy.mechanism import GaussianQuery, MomentRelease
from dpsynth.privacy.noise import NoiseStream

Array = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Record = Callable[[str, Array, Array], None]

LOW_BANDS, HIGH_BANDS = 4, 14  # rings of frequency inside and outside the low block, per channel
LARGEST_LOW_BLOCK = 256  # coefficients; second moments cost their square
_COUNT_WEIGHT = 0.3
_SHARES = {"means": 0.2, "second_moments": 0.7, "bands": 0.1}
_SMALLEST_VARIANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Frequencies:
    """Layout of the cosine domain: flat index = channel * pixels + pixel. low: indices of the low block; band: of each index.

    No band holds both low and other coefficients.
    """

    shape: tuple[int, ...]  # (channel, *space)
    low: Int64
    band: Int64

    @property
    def num_bands(self) -> int:
        """Bands over all channels."""
        return (LOW_BANDS + HIGH_BANDS) * self.shape[0]


@lru_cache(maxsize=8)
def frequencies(shape: tuple[int, ...], low_frequencies: int) -> Frequencies:
    """The layout for images of `shape` (channel, *space) with the given low frequencies per axis, at most 256 in all."""
    axes = np.meshgrid(*(np.arange(side) for side in shape[1:]), indexing="ij")
    radius = np.sqrt(sum(axis.astype(np.float64) ** 2 for axis in axes)).ravel()
    inside = np.all([axis.ravel() < low_frequencies for axis in axes], axis=0)
    candidates = np.flatnonzero(inside)
    limit = LARGEST_LOW_BLOCK // shape[0]
    if len(candidates) > limit:
        candidates = candidates[np.argsort(radius[candidates], kind="stable")[:limit]]
    pixels = radius.size
    low = np.concatenate([np.sort(candidates) + channel * pixels for channel in range(shape[0])])
    is_low = np.isin(np.arange(pixels), candidates)
    one = np.where(is_low, _rings(radius, is_low, LOW_BANDS), LOW_BANDS + _rings(radius, ~is_low, HIGH_BANDS))
    band = np.concatenate([one + channel * (LOW_BANDS + HIGH_BANDS) for channel in range(shape[0])]).astype(np.int64)
    return Frequencies(shape=shape, low=low.astype(np.int64), band=band)


def _rings(radius: Array, among: NDArray[np.bool_], count: int) -> Int64:
    """Ring of each coefficient: radii cut into `count` rings that hold about equally many of those `among`."""
    if not among.any():
        return np.zeros(len(radius), dtype=np.int64)
    edges = np.quantile(radius[among], np.linspace(0, 1, count + 1)[1:-1])
    return np.searchsorted(edges, radius, side="left").astype(np.int64)


def to_frequencies(images: Float32) -> Array:
    """(n, channel, *space) to (n, channel * pixels) coefficients of the orthonormal cosine transform."""
    axes = tuple(range(2, images.ndim))
    return np.asarray(dctn(images.astype(np.float64), axes=axes, norm="ortho").reshape(len(images), -1))


def from_frequencies(coefficients: Array, shape: tuple[int, ...]) -> Float32:
    """Inverse of `to_frequencies`."""
    axes = tuple(range(2, len(shape) + 1))
    return np.asarray(idctn(coefficients.reshape(-1, *shape), axes=axes, norm="ortho"), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class PublicReference:
    """Public constants. centre: (low,); clip norms of raw vectors; band_scale: (bands,) makes typical energies 1."""

    shape: tuple[int, ...]
    low_frequencies: int
    centre: Array
    clip_low: float
    clip_residual: float
    clip_bands: float
    band_scale: Array

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        arrays = {"centre": self.centre.tolist(), "band_scale": self.band_scale.tolist(), "shape": list(self.shape)}
        return {**self.__dict__, **arrays}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PublicReference:
        """Inverse of `to_json`."""
        arrays = {
            "centre": np.array(value["centre"]),
            "band_scale": np.array(value["band_scale"]),
            "shape": tuple(value["shape"]),
        }
        return cls(**{**value, **arrays})


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Class-wise moments. counts: (classes,); mean: (classes, low); covariance: (classes, low, low); variance: (classes, channel * pixels),
    of each coefficient; of a low one only what the covariance leaves unexplained.
    """

    shape: tuple[int, ...]
    low_frequencies: int
    counts: Array
    mean: Array
    covariance: Array
    variance: Array

    @property
    def num_classes(self) -> int:
        """Classes."""
        return len(self.counts)

    @property
    def probabilities(self) -> Array:
        """Class frequencies as released, (classes,), positive, sum 1."""
        counts = np.maximum(self.counts, 1e-3 * self.counts.sum())
        return np.asarray(counts / counts.sum())

    def to_arrays(self) -> dict[str, NDArray[np.float64]]:
        """The arrays by name, for safetensors."""
        return {name: np.ascontiguousarray(getattr(self, name)) for name in ("counts", "mean", "covariance", "variance")}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], *, shape: tuple[int, ...], low_frequencies: int) -> Moments:
        """Inverse of `to_arrays`."""
        return cls(
            shape=shape,
            low_frequencies=low_frequencies,
            **{name: arrays[name] for name in ("counts", "mean", "covariance", "variance")},
        )


def public_reference(images: Float32, *, low_frequencies: int) -> PublicReference:
    """Constants from public images (n, channel, *space) in [-1, 1]: centre, and norms that most public images keep to."""
    shape = images.shape[1:]
    layout = frequencies(shape, low_frequencies)
    coefficients = to_frequencies(images)
    centre = coefficients[:, layout.low].mean(axis=0)
    residual = coefficients[:, layout.low] - centre
    norms = np.linalg.norm(residual, axis=1)
    centred = coefficients - coefficients.mean(axis=0)
    energies = _energies(centred, layout)
    scale = 1 / (np.median(energies, axis=0) + 1e-3)
    return PublicReference(
        shape=shape,
        low_frequencies=low_frequencies,
        centre=centre,
        clip_low=float(np.quantile(norms, 0.95)),
        clip_residual=float(np.quantile(norms, 0.7)),
        clip_bands=float(np.quantile(np.linalg.norm(energies * scale, axis=1), 0.8)),
        band_scale=scale,
    )


def moment_queries(reference: PublicReference) -> tuple[GaussianQuery, ...]:
    """The queries of the release with their clip norms."""
    weight = _COUNT_WEIGHT * reference.clip_low
    norms = {
        "means": float(np.hypot(weight, reference.clip_low)),
        "second_moments": reference.clip_residual**2,
        "bands": reference.clip_bands,
    }
    return tuple(GaussianQuery(name=name, share=share, clip_norm=norms[name]) for name, share in _SHARES.items())


def release_moments(
    images: Float32,
    labels: Int64,
    patients: Int64,
    *,
    num_classes: int,
    mechanism: MomentRelease | None,
    reference: PublicReference,
    stream: NoiseStream | None,
    record: Record | None = None,
    labels_of_cells: Int64 | None = None,
) -> Moments:
    """Noised moments of images (n, channel, *space) of patients (n,). Without a mechanism they are exact, for public images only.

    With attributes `labels` are cells, and `labels_of_cells` (classes,) holds the label that each of them leans on.
    `record` is told each query's name, its exact sums and its noised sums, (classes, width) each, so that a monitor can compare.
    """
    if (mechanism is None) != (stream is None):
        raise ValueError("Expected a mechanism and a noise stream, or neither.")
    layout = frequencies(reference.shape, reference.low_frequencies)
    release = _Release(labels, patients, num_classes, mechanism, stream, record, labels_of_cells)
    coefficients = to_frequencies(images)
    means = _release_means(coefficients[:, layout.low], release, reference)
    if labels_of_cells is None:
        counts, mean = means.counts, reference.centre + means.sums / means.counts[:, None]
    else:
        counts, mean = means.patients, reference.centre + _pooled(means, means.sums, labels_of_cells, shape=_falloff(layout))
    covariance = _release_second_moments(coefficients[:, layout.low] - mean[labels], release, counts, reference)
    if labels_of_cells is not None:  # once more, now that the scatter within cells is known
        scatter = np.diagonal(covariance, axis1=1, axis2=2).mean(axis=0)
        mean = reference.centre + _pooled(means, means.sums, labels_of_cells, shape=_falloff(layout), scatter=scatter)
    variance = _release_bands(coefficients, labels, release, means, mean, covariance, layout, reference)
    return Moments(
        shape=reference.shape,
        low_frequencies=reference.low_frequencies,
        counts=counts,
        mean=mean,
        covariance=covariance,
        variance=variance,
    )


@dataclass(frozen=True)
class _Release:
    """Sums over patients with noise from the mechanism, and nothing else touches the images."""

    labels: Int64
    patients: Int64
    num_classes: int
    mechanism: MomentRelease | None
    stream: NoiseStream | None
    record: Record | None = None
    labels_of_cells: Int64 | None = None

    def noised_sum(self, name: str, rows: Array, clip_norm: float) -> Array:
        """Sum over patients of the mean over their rows of class-indexed, clipped vectors: (classes, width). rows: (n, width)."""
        if self.mechanism is not None and clip_norm != self.mechanism.query(name).clip_norm:
            raise ValueError(f"The clip norm of query {name!r} is not the booked one.")
        total = patient_sum(rows, self.labels, self.patients, self.num_classes, clip_norm)
        noised = np.asarray(total + self.noise_stddev(name) * self._normal(name, total.size).reshape(total.shape))
        if self.record is not None:
            self.record(name, total, noised)
        return noised

    def noise_stddev(self, name: str) -> float:
        return 0.0 if self.mechanism is None else self.mechanism.noise_stddev(name)

    def _normal(self, name: str, size: int) -> Array:
        return np.zeros(size) if self.stream is None else self.stream.normal(f"moments/{name}", 0, size)


def patient_sum(rows: Array, labels: Int64, patients: Int64, num_classes: int, clip_norm: float) -> Array:
    """(classes, width): each patient adds a vector of norm at most `clip_norm`. Rows that are not finite count as zero."""
    rows = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0.0)
    norms = np.linalg.norm(rows, axis=1)
    factor = np.minimum(1.0, clip_norm / np.maximum(norms, 1e-12))
    images_of = np.bincount(patients)
    weighted = rows * (factor / images_of[patients])[:, None]
    total = np.zeros((num_classes, rows.shape[1]))
    for label in range(num_classes):
        total[label] = weighted[labels == label].sum(axis=0)
    return total


@dataclass(frozen=True, kw_only=True)
class _Means:
    """Noised sums of the low block around the centre, (classes, low), and counts (classes,), raised above the noise or made consistent."""

    sums: Array
    counts: Array
    patients: Array
    stddev: float  # of the noise on each number
    count_stddev: float


def count_stddev(mechanism: MomentRelease, reference: PublicReference) -> float:
    """Standard deviation of the noise on the count of each class, in patients."""
    return mechanism.noise_stddev("means") / (_COUNT_WEIGHT * reference.clip_low)


def _release_means(low: Array, release: _Release, reference: PublicReference) -> _Means:
    weight = _COUNT_WEIGHT * reference.clip_low
    query = float(np.hypot(weight, reference.clip_low))
    centred = low - reference.centre
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    clipped = centred * np.minimum(1.0, reference.clip_low / np.maximum(norms, 1e-12))
    stacked = np.concatenate([np.full((len(low), 1), weight), clipped], axis=1)
    total = release.noised_sum("means", stacked, query)
    stddev = release.noise_stddev("means")
    smallest = max(1.0, 2 * stddev / weight)
    return _Means(
        sums=total[:, 1:],
        counts=np.maximum(total[:, 0] / weight, smallest),
        patients=consistent_counts(total[:, 0] / weight, smallest),
        stddev=stddev,
        count_stddev=stddev / weight,
    )


def _falloff(layout: Frequencies) -> Array:
    """How cells are thought to differ by frequency, (low,): as the power of images does, which falls with its square (Field 1987)."""
    pixels = np.unravel_index(layout.low % int(np.prod(layout.shape[1:])), layout.shape[1:])
    return np.asarray(1 / (1 + sum(axis.astype(np.float64) ** 2 for axis in pixels)))


def _pooled(
    means: _Means, sums: Array, labels_of_cells: Int64, *, shape: Array, stddev: float | None = None, scatter: Array | None = None
) -> Array:
    """Means of cells (cells, width) from noised sums, by default of the means' noise, with that of the counts."""
    total, count = joined_sum(sums, means.patients)
    uncertain_count = (means.count_stddev * total / max(count, 1e-12)) ** 2
    variances = Variances(
        noise=(means.stddev if stddev is None else stddev) ** 2 + uncertain_count,
        scatter=np.zeros(sums.shape[1]) if scatter is None else scatter,
        shape=shape,
    )
    return pooled_means(sums, means.patients, labels_of_cells, variances)


def _release_second_moments(residual: Array, release: _Release, counts: Array, reference: PublicReference) -> Array:
    """Covariance of the low block, (classes, low, low), positive semidefinite, with the bias of the noise taken off."""
    width = residual.shape[1]
    rows, columns = np.triu_indices(width)
    weight = np.where(rows == columns, 1.0, np.sqrt(2.0))  # the norm of the weighted half is the norm of the matrix
    norms = np.linalg.norm(residual, axis=1, keepdims=True)
    clipped = residual * np.minimum(1.0, reference.clip_residual / np.maximum(norms, 1e-12))
    halves = clipped[:, rows] * clipped[:, columns] * weight
    total = release.noised_sum("second_moments", halves, reference.clip_residual**2)
    matrices = np.zeros((len(counts), width, width))
    matrices[:, rows, columns] = total / weight
    matrices = matrices + np.triu(matrices, 1).transpose(0, 2, 1) if width > 1 else matrices
    matrices[:, columns, rows] = matrices[:, rows, columns]
    stddev = release.noise_stddev("second_moments")
    if release.labels_of_cells is not None:
        return pooled_covariances(matrices, counts, release.labels_of_cells, stddev=stddev)
    pooled = _denoised(matrices.sum(axis=0), counts.sum(), stddev * np.sqrt(len(counts)))
    own_weight = counts / (counts + width)  # few patients: lean on all classes together
    own = np.stack([_denoised(matrix, count, stddev) for matrix, count in zip(matrices, counts, strict=True)])
    return np.asarray(own_weight[:, None, None] * own + (1 - own_weight[:, None, None]) * pooled)


def _denoised(total: Array, count: float, stddev: float) -> Array:
    """Drop eigenvalues below the edge of pure noise (semicircle law) and take its bias off the others."""
    values, vectors = np.linalg.eigh(total / count)
    edge = stddev / count * np.sqrt(2 * len(values))
    kept = np.where(values > max(edge, _SMALLEST_VARIANCE), values - edge**2 / (2 * np.maximum(values, 1e-12)), 0.0)
    return np.asarray((vectors * np.maximum(kept, 0)) @ vectors.T)


def _energies(rest: Array, layout: Frequencies) -> Array:
    """Sum of squares by band: (n, bands)."""
    squared = rest**2
    return np.stack([squared[:, layout.band == band].sum(axis=1) for band in range(layout.num_bands)], axis=1)


def _release_bands(
    coefficients: Array,
    labels: Int64,
    release: _Release,
    means: _Means,
    mean: Array,
    covariance: Array,
    layout: Frequencies,
    reference: PublicReference,
) -> Array:
    centred = coefficients.copy()
    centred[:, layout.low] -= mean[labels]
    energies = _energies(centred, layout)
    total = release.noised_sum("bands", energies * reference.band_scale, reference.clip_bands)
    if release.labels_of_cells is None:
        energy = np.maximum(total, 0) / means.counts[:, None]
    else:
        energy = _pooled(means, total, release.labels_of_cells, shape=np.ones(total.shape[1]), stddev=release.noise_stddev("bands"))
    per_band = energy / reference.band_scale
    per_band = np.maximum(per_band, 0.02 / reference.band_scale)  # a band that drowned in noise keeps a little of the public energy
    explained = np.zeros_like(per_band)
    for label in range(release.num_classes):
        np.add.at(explained[label], layout.band[layout.low], np.diag(covariance[label]))
    sizes = np.maximum(np.bincount(layout.band, minlength=layout.num_bands), 1)
    variance = np.maximum(per_band - explained, 0) / sizes
    return np.asarray(np.maximum(variance[:, layout.band], _SMALLEST_VARIANCE))


def sample_moment_images(moments: Moments, labels: Int64, seeds: NDArray[np.uint64], *, texture: bool) -> Float32:
    """Gaussian images (n, channel, *space) clipped to [-1, 1], image i from its own seed; with `texture` above the low block too."""
    layout = frequencies(moments.shape, moments.low_frequencies)
    roots = np.stack([_root(covariance) for covariance in moments.covariance])
    coefficients = np.zeros((len(labels), layout.band.size))
    for index, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
        rng = np.random.default_rng(int(seed))
        normal = rng.normal(size=len(layout.low))
        if texture:
            coefficients[index] = np.sqrt(moments.variance[label]) * rng.normal(size=layout.band.size)
        coefficients[index, layout.low] += moments.mean[label] + roots[label] @ normal
    return np.clip(from_frequencies(coefficients, moments.shape), -1, 1)


def low_covariance(moments: Moments, label: int) -> Array:
    """Full covariance of the low block, (low, low): the released one plus the diagonal that it leaves unexplained."""
    layout = frequencies(moments.shape, moments.low_frequencies)
    return np.asarray(moments.covariance[label] + np.diag(moments.variance[label, layout.low]))


def _root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)))
