"""Class-wise moments of images, a generator of its own and the prior of the denoiser, and the public constants of their release.

Images are taken to the orthonormal cosine domain: a block of low frequencies, and rings of frequency above it. How moments of patients are
released: `moment_release`. All its constants (centre, axes, clip norms, typical log-energies) are computed here, on public images, never on
private ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn, idctn

from dpsynth.model.principal_axes import PrincipalAxes

Array = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

_AT_ONCE = 2**22  # coefficients that are transformed at once
BANDS = 14  # rings of frequency above the low block, per channel
LARGEST_LOW_BLOCK = 256  # coefficients; second moments cost their square
_CLIPPED = 0.25  # quantile of public residuals that is their clip norm
SMALLEST_VARIANCE = 1e-6
_SMALLEST_ENERGY = 1e-3  # of a typical one: what is added before the logarithm
_ROOM = np.log(3.0)  # log of how much stronger or weaker in every ring another hospital's images may be without being clipped


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
    """Public constants. centre: (low,); principal: the axes of the low frequencies; spectrum: (channel * pixels,), mean square of each
    coefficient; typical: (bands + 1,), mean energies of the rings and, last, of the shaped residual; log_energies: (bands + 1,), mean
    logarithm of an image's energies in these units; clip_residuals: (low,), of residuals along the one, two, ... strongest axes.
    """

    shape: tuple[int, ...]
    low_frequencies: int
    centre: Array
    principal: PrincipalAxes
    spectrum: Array
    typical: Array
    log_energies: Array
    clip_low: float
    clip_residuals: Array
    clip_scales: float
    clip_energies: float

    @property
    def clip_second_moments(self) -> float:
        """What is booked for them, whichever axes are released."""
        return float(self.clip_residuals[-1] ** 2)


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
    low, bands, spectrum = summaries(images, layout)
    centre = low.mean(axis=0)
    residual = low - centre
    principal = PrincipalAxes.of(residual, smallest=SMALLEST_VARIANCE)
    shaped = principal.shaped(residual)
    norms, energies = np.linalg.norm(shaped, axis=1), with_residuals(bands, shaped)
    typical = energies.mean(axis=0) + SMALLEST_VARIANCE
    logarithms = log_ratios(energies, typical)
    log_energies = logarithms.mean(axis=0)
    return PublicReference(
        shape=shape,
        low_frequencies=low_frequencies,
        centre=centre,
        principal=principal,
        spectrum=np.maximum(spectrum, SMALLEST_VARIANCE),
        typical=typical,
        log_energies=log_energies,
        # Another hospital's images may be brighter than all of these: means get room for it, residuals are taken around the means.
        clip_low=1.5 * float(np.quantile(norms, 0.95)),
        clip_residuals=np.quantile(np.sqrt(np.cumsum(shaped[:, ::-1] ** 2, axis=1)), _CLIPPED, axis=0),
        # Few numbers: wide bounds cost little.
        clip_scales=float(np.quantile(np.linalg.norm(logarithms - log_energies, axis=1), 0.95) + _ROOM * np.sqrt(len(typical))),
        clip_energies=float(np.quantile(np.linalg.norm(energies / typical, axis=1), 0.95)),
    )


def with_residuals(bands: Array, shaped: Array) -> Array:
    """Energies of the rings (n, bands) and, last, of shaped residuals (n, low): (n, bands + 1)."""
    return np.concatenate([bands, (shaped**2).sum(axis=1, keepdims=True)], axis=1)


def log_ratios(energies: Array, typical: Array) -> Array:
    """Logarithm of energies (n, bands + 1) in units of typical ones."""
    return np.asarray(np.log(energies / typical + _SMALLEST_ENERGY))


def parts(images: Float32) -> list[slice]:
    """Of images (n, channel, *space) so many at a time that their coefficients need little memory."""
    size = max(1, _AT_ONCE // int(np.prod(images.shape[1:])))
    return [slice(start, start + size) for start in range(0, len(images), size)]


def ring_energies(squared: Array, layout: Frequencies) -> Array:
    """Sum over each ring of frequencies above the low block, (n, bands), of squared coefficients (n, channel * pixels)."""
    return np.stack([squared[:, layout.band == band].sum(axis=1) for band in range(layout.num_bands)], axis=1)


def summaries(images: Float32, layout: Frequencies) -> tuple[Array, Array, Array]:
    """Low coefficients (n, low) and energies by band (n, bands) of each image, and the mean square of each coefficient (channel * pixels,).

    In parts, so that memory stays small whatever the size of the images.
    """
    low, bands, total = [], [], np.zeros(layout.band.size)
    for part in parts(images):
        coefficients = to_frequencies(images[part])
        squared = coefficients**2
        low.append(coefficients[:, layout.low])
        bands.append(ring_energies(squared, layout))
        total += squared.sum(axis=0)
    return np.concatenate(low), np.concatenate(bands), total / len(images)


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
    """The symmetric one: the signs of eigenvectors differ between machines, and images of one seed must not."""
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T)
