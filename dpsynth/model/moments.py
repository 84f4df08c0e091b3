"""Stage 1: class-wise moments under differential privacy, a generator of its own and the prior of the denoiser.

Images are taken to the orthonormal cosine domain. Of each class three noised sums are released, each query using the results of the
one before: count and sum of the low frequencies; second moments of their residuals; energies of the rings of frequency above them.
A patient's contribution to a query is the mean over their images of class-indexed vectors that were clipped to the query's clip
norm, so by convexity it is never longer than the clip norm, whatever and however many the images are.

All constants (centre, axes, clip norms, band scales) are computed on public images, never on private ones. Public images serve twice.
The low frequencies are released along their principal axes, each divided by the fourth root of its public variance: noise is equal on all
axes, so this puts less of it on the many weak ones. And what the noise hides is taken from them (`pooling`). With attributes the classes
are cells, and small ones lean on their label; the bound does not depend on what a class is.
Sources: Dwork et al. 2014 (Analyze Gauss) for noised second moments; Liew et al. 2022 for one-shot moments as generators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn, idctn

from dpsynth.model.pooling import Variances, consistent_counts, joined_sum, pooled_covariances, pooled_means, towards_one
from dpsynth.privacy.mechanism import GaussianQuery, MomentRelease
from dpsynth.privacy.noise import NoiseStream

Array = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Record = Callable[[str, Array, Array], None]

_BLOCK = 256  # images that are transformed at once
BANDS = 14  # rings of frequency above the low block, per channel
LARGEST_LOW_BLOCK = 256  # coefficients; second moments cost their square
_COUNT_WEIGHT = 0.3
_SHARES = {"means": 0.3, "second_moments": 0.6, "bands": 0.1}
_SMALLEST_VARIANCE = 1e-6
_SHAPING = 0.25  # power of the public variance that an axis is divided by: 0 is none, 0.5 makes all axes equal


@dataclass(frozen=True, kw_only=True)
class Frequencies:
    """Layout of the cosine domain: flat index = channel * pixels + pixel. low: the low block; band: of each index, -1 in the block."""

    shape: tuple[int, ...]  # (channel, *space)
    low: Int64
    band: Int64

    @property
    def num_bands(self) -> int:
        """Bands over all channels."""
        return BANDS * self.shape[0]


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
    above = ~np.isin(np.arange(pixels), candidates)
    edges = np.quantile(radius[above], np.linspace(0, 1, BANDS + 1)[1:-1]) if above.any() else np.empty(0)
    one = np.where(above, np.searchsorted(edges, radius, side="left"), -BANDS * shape[0])
    band = np.concatenate([np.maximum(one + channel * BANDS, -1) for channel in range(shape[0])]).astype(np.int64)
    return Frequencies(shape=shape, low=low.astype(np.int64), band=band)


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
    """Public constants. centre: (low,); axes: (low, low), principal axes in columns; energies: (low,), variances along them; spectrum:
    (channel * pixels,), mean square of each coefficient; band_scale: (bands,) makes typical energies 1; clip norms are of shaped vectors.
    """

    shape: tuple[int, ...]
    low_frequencies: int
    centre: Array
    axes: Array
    energies: Array
    spectrum: Array
    band_scale: Array
    clip_low: float
    clip_residual: float
    clip_bands: float

    def shaped(self, residuals: Array) -> Array:
        """Rows (n, low) along the principal axes, weak ones made larger."""
        return np.asarray(residuals @ self.axes * self.energies**-_SHAPING)

    @property
    def shaped_energies(self) -> Array:
        """Public variances of shaped vectors, (low,)."""
        return np.asarray(self.energies ** (1 - 2 * _SHAPING))

    def unshaped(self, rows: Array) -> Array:
        """Inverse of `shaped`."""
        return np.asarray((rows * self.energies**_SHAPING) @ self.axes.T)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Class-wise moments. counts: (classes,); mean: (classes, low); covariance: (classes, low, low); variance: (classes, channel * pixels),
    of each coefficient above the low block, 0 within it.
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
    """Constants from public images (n, channel, *space) in [-1, 1]: centre, axes, and norms that most public images keep to."""
    shape = images.shape[1:]
    layout = frequencies(shape, low_frequencies)
    low, energies, spectrum = _summaries(images, layout)
    centre = low.mean(axis=0)
    residual = low - centre
    values, axes = np.linalg.eigh(residual.T @ residual / len(residual))
    constants = PublicReference(
        shape=shape,
        low_frequencies=low_frequencies,
        centre=centre,
        axes=axes,
        energies=np.maximum(values, max(values.mean() * 1e-4, _SMALLEST_VARIANCE)),
        spectrum=np.maximum(spectrum, _SMALLEST_VARIANCE),
        band_scale=1 / (np.median(energies, axis=0) + 1e-3),
        clip_low=1.0,
        clip_residual=1.0,
        clip_bands=1.0,
    )
    norm = float(np.quantile(np.linalg.norm(constants.shaped(residual), axis=1), 0.95))
    bands = 2 * float(np.quantile(np.linalg.norm(energies * constants.band_scale, axis=1), 0.95))  # few numbers: a wide bound costs little
    # Another hospital's images may be brighter than all of these: means get room for it, residuals are taken around the means.
    return replace(constants, clip_low=1.5 * norm, clip_residual=norm, clip_bands=max(bands, 1e-3))


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
    """Noised moments of images (n, channel, *space) of patients (n,). Without a mechanism there is no noise, for public images only.

    With attributes `labels` are cells, and `labels_of_cells` (classes,) holds the label that each of them leans on.
    `record` is told each query's name, its exact sums and its noised sums, (classes, width) each, so that a monitor can compare.
    """
    if (mechanism is None) != (stream is None):
        raise ValueError("Expected a mechanism and a noise stream, or neither.")
    layout = frequencies(reference.shape, reference.low_frequencies)
    groups = np.arange(num_classes) if labels_of_cells is None else labels_of_cells
    release = _Release(labels, patients, num_classes, mechanism, stream, groups, record)
    low, energies, _ = _summaries(images, layout)
    counts, mean = _release_means(low, release, reference)
    covariance = _release_second_moments(low - mean[labels], release, counts, reference)
    variance = _release_bands(energies * reference.band_scale, release, counts, layout, reference)
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
    labels_of_cells: Int64
    record: Record | None = None

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


def count_stddev(mechanism: MomentRelease, reference: PublicReference) -> float:
    """Standard deviation of the noise on the count of each class, in patients."""
    return mechanism.noise_stddev("means") / (_COUNT_WEIGHT * reference.clip_low)


def _release_means(low: Array, release: _Release, reference: PublicReference) -> tuple[Array, Array]:
    weight = _COUNT_WEIGHT * reference.clip_low
    query = float(np.hypot(weight, reference.clip_low))
    clipped = _clipped(reference.shaped(low - reference.centre), reference.clip_low)
    stacked = np.concatenate([np.full((len(low), 1), weight), clipped], axis=1)
    total = release.noised_sum("means", stacked, query)
    stddev = release.noise_stddev("means")
    counts = consistent_counts(total[:, 0] / weight, max(1.0, 2 * stddev / weight))
    joined, count = joined_sum(total[:, 1:], counts)
    uncertain_count = (stddev / weight * joined / max(count, 1e-12)) ** 2
    energies = reference.shaped_energies  # patients scatter, and classes are thought to differ, as public images do
    variances = Variances(noise=stddev**2 + uncertain_count, scatter=energies if stddev else 0 * energies, shape=energies)
    mean = pooled_means(total[:, 1:], counts, release.labels_of_cells, variances)
    return counts, reference.centre + reference.unshaped(mean)


def _clipped(rows: Array, norm: float) -> Array:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows * np.minimum(1.0, norm / np.maximum(norms, 1e-12)))


def _release_second_moments(residual: Array, release: _Release, counts: Array, reference: PublicReference) -> Array:
    """Covariance of the low block, (classes, low, low), positive definite."""
    width = residual.shape[1]
    rows, columns = np.triu_indices(width)
    weight = np.where(rows == columns, 1.0, np.sqrt(2.0))  # the norm of the weighted half is the norm of the matrix
    clipped = _clipped(reference.shaped(residual), reference.clip_residual)
    halves = clipped[:, rows] * clipped[:, columns] * weight
    total = release.noised_sum("second_moments", halves, reference.clip_residual**2)
    matrices = np.zeros((len(counts), width, width))
    matrices[:, rows, columns] = total / weight
    matrices[:, columns, rows] = matrices[:, rows, columns]
    covariances = pooled_covariances(
        matrices,
        counts,
        release.labels_of_cells,
        stddev=release.noise_stddev("second_moments"),
        prior=np.diag(reference.shaped_energies),
    )
    return np.stack([reference.unshaped(reference.unshaped(covariance).T) for covariance in covariances])


def _summaries(images: Float32, layout: Frequencies) -> tuple[Array, Array, Array]:
    """Low coefficients (n, low) and energies by band (n, bands) of each image, and the mean square of each coefficient (channel * pixels,).

    In blocks, so that memory stays small whatever the size of the images.
    """
    low, energies, total = [], [], np.zeros(layout.band.size)
    for start in range(0, len(images), _BLOCK):
        coefficients = to_frequencies(images[start : start + _BLOCK])
        squared = coefficients**2
        low.append(coefficients[:, layout.low])
        energies.append(np.stack([squared[:, layout.band == band].sum(axis=1) for band in range(layout.num_bands)], axis=1))
        total += squared.sum(axis=0)
    return np.concatenate(low), np.concatenate(energies), total / len(images)


def _release_bands(energies: Array, release: _Release, counts: Array, layout: Frequencies, reference: PublicReference) -> Array:
    """Variance above the low block: the public spectrum times the ratio of the ring's energy, (classes, channel * pixels)."""
    total = release.noised_sum("bands", energies, reference.clip_bands)
    public = np.bincount(layout.band + 1, weights=reference.spectrum, minlength=layout.num_bands + 1)[1:] * reference.band_scale
    public = np.maximum(public, _SMALLEST_VARIANCE)
    stddev, ones = release.noise_stddev("bands"), np.ones(layout.num_bands)
    variances = Variances(noise=(stddev / public) ** 2, scatter=0 * ones, shape=ones)
    own = pooled_means(total / public, counts, release.labels_of_cells, variances)
    ratio = towards_one(own, stddev / max(float(np.linalg.norm(counts)), 1e-12) / public)
    variance = np.maximum(ratio[:, layout.band] * reference.spectrum, _SMALLEST_VARIANCE)
    variance[:, layout.low] = 0
    return np.asarray(variance)


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


def _root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)))
