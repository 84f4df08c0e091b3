"""Stage 1: class-wise moments under differential privacy, a generator of its own and the prior of the denoiser.

Images are taken to the orthonormal cosine domain. Of each class four noised sums are released, each query using the results of the
ones before: count and sum of the low frequencies; log-energies of their residuals and of the rings of frequency above them (scales); the
same energies in units of these; second moments of the residuals.
How a patient's contribution is bounded: `noised_sums`.

All constants (centre, axes, clip norms, typical log-energies) are computed on public images, never on private ones. Another hospital's
images may be several times as strong, so energies are released as logarithms, which no factor drives out of the clip norm, and residuals
are divided by the released size before their second moments are taken. Public images serve twice.
The low frequencies are released along their principal axes, each divided by the fourth root of its public variance: noise is equal on all
axes, so this puts less of it on the many weak ones. Second moments are released along the axes that stand above the noise, and what the
noise hides is taken from the public ones (`pooling`). With attributes the classes are cells, and small ones lean on their label; the
bound does not depend on what a class is.
Sources: Dwork et al. 2014 (Analyze Gauss) for noised second moments; Liew et al. 2022 for one-shot moments as generators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn, idctn

from dpsynth.model.noised_sums import NoisedSums, Record, clipped
from dpsynth.model.pooling import Variances, consistent_counts, joined_sum, pooled_covariances, pooled_means, towards_one
from dpsynth.model.principal_axes import PrincipalAxes
from dpsynth.privacy.mechanism import GaussianQuery, MomentRelease
from dpsynth.privacy.noise import NoiseStream

Array = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

_AT_ONCE = 2**22  # coefficients that are transformed at once
BANDS = 14  # rings of frequency above the low block, per channel
LARGEST_LOW_BLOCK = 256  # coefficients; second moments cost their square
_COUNT_WEIGHT = 0.3
_SHARES = {"means": 0.25, "scales": 0.03, "energies": 0.12, "second_moments": 0.6}
_ABOVE_NOISE = 16.0  # noise standard deviations of the expected second moment along an axis, for it to be released
_FEWEST_AXES = 12  # released whatever the noise: with less than 78 numbers of a class nobody could tell whether the booked noise was added
_CLIPPED = 0.25  # quantile of public residuals that is their clip norm
_SMALLEST_VARIANCE = 1e-6
_SMALLEST_ENERGY = 1e-3  # of a typical one: what is added before the logarithm
_ROOM = np.log(3.0)  # log of how much stronger or weaker in every ring another hospital's images may be without being clipped
_TYPICAL_LOG_RATIO, _LARGEST_LOG_RATIO = np.log(2.0), np.log(20.0)  # spread of such ratios, and what is never believed


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
    principal = PrincipalAxes.of(residual, smallest=_SMALLEST_VARIANCE)
    shaped = principal.shaped(residual)
    norms, energies = np.linalg.norm(shaped, axis=1), _with_residuals(bands, shaped)
    typical = energies.mean(axis=0) + _SMALLEST_VARIANCE
    logarithms = _logarithms(energies, typical)
    log_energies = logarithms.mean(axis=0)
    return PublicReference(
        shape=shape,
        low_frequencies=low_frequencies,
        centre=centre,
        principal=principal,
        spectrum=np.maximum(spectrum, _SMALLEST_VARIANCE),
        typical=typical,
        log_energies=log_energies,
        # Another hospital's images may be brighter than all of these: means get room for it, residuals are taken around the means.
        clip_low=1.5 * float(np.quantile(norms, 0.95)),
        clip_residuals=np.quantile(np.sqrt(np.cumsum(shaped[:, ::-1] ** 2, axis=1)), _CLIPPED, axis=0),
        # Few numbers: wide bounds cost little.
        clip_scales=float(np.quantile(np.linalg.norm(logarithms - log_energies, axis=1), 0.95) + _ROOM * np.sqrt(len(typical))),
        clip_energies=float(np.quantile(np.linalg.norm(energies / typical, axis=1), 0.95)),
    )


def _with_residuals(bands: Array, shaped: Array) -> Array:
    return np.concatenate([bands, (shaped**2).sum(axis=1, keepdims=True)], axis=1)


def _logarithms(energies: Array, typical: Array) -> Array:
    return np.asarray(np.log(energies / typical + _SMALLEST_ENERGY))


def moment_queries(reference: PublicReference) -> tuple[GaussianQuery, ...]:
    """The queries of the release with their clip norms."""
    weight = _COUNT_WEIGHT * reference.clip_low
    norms = {
        "means": float(np.hypot(weight, reference.clip_low)),
        "scales": reference.clip_scales,
        "energies": reference.clip_energies,
        "second_moments": reference.clip_second_moments,
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
    layout = frequencies(reference.shape, reference.low_frequencies)
    groups = np.arange(num_classes) if labels_of_cells is None else labels_of_cells
    release = NoisedSums(labels=labels, patients=patients, num_classes=num_classes, mechanism=mechanism, stream=stream, record=record)
    low, bands, _ = summaries(images, layout)
    counts, mean = _release_means(low, release, groups, reference)
    shaped = reference.principal.shaped(low - mean[labels])
    ratio = _release_energies(bands, shaped, release, groups, counts, reference)
    covariance = _release_second_moments(shaped, release, groups, counts, reference, ratio[:, -1])
    variance = np.maximum(ratio[:, layout.band] * reference.spectrum, _SMALLEST_VARIANCE)
    variance[:, layout.low] = 0
    return Moments(
        shape=reference.shape,
        low_frequencies=reference.low_frequencies,
        counts=counts,
        mean=mean,
        covariance=covariance,
        variance=variance,
    )


def count_stddev(mechanism: MomentRelease, reference: PublicReference) -> float:
    """Standard deviation of the noise on the count of each class, in patients."""
    return mechanism.noise_stddev("means") / (_COUNT_WEIGHT * reference.clip_low)


def _release_means(low: Array, release: NoisedSums, groups: Int64, reference: PublicReference) -> tuple[Array, Array]:
    weight = _COUNT_WEIGHT * reference.clip_low
    query = float(np.hypot(weight, reference.clip_low))
    kept = clipped(reference.principal.shaped(low - reference.centre), reference.clip_low)
    stacked = np.concatenate([np.full((len(low), 1), weight), kept], axis=1)
    total = release.noised_sum("means", stacked, query)
    stddev = release.noise_stddev("means")
    counts = consistent_counts(total[:, 0] / weight, max(1.0, 2 * stddev / weight))
    joined, count = joined_sum(total[:, 1:], counts)
    uncertain_count = (stddev / weight * joined / max(count, 1e-12)) ** 2
    public = reference.principal.shaped_variances  # patients scatter, and classes are thought to differ, as public images do
    variances = Variances(noise=stddev**2 + uncertain_count, scatter=public if stddev else 0 * public, shape=public)
    mean = pooled_means(total[:, 1:], counts, groups, variances)
    return counts, reference.centre + reference.principal.unshaped(mean)


def _release_energies(bands: Array, shaped: Array, release: NoisedSums, groups: Int64, counts: Array, reference: PublicReference) -> Array:
    """Mean energies of rings and, last, of the shaped residual, as multiples of the public ones: (classes, bands + 1).

    Their scale first, which may be far from the public one, from logarithms; then the energies themselves in units of that scale.
    """
    energies = _with_residuals(bands, shaped)
    ones = np.ones(energies.shape[1])
    size = max(float(np.linalg.norm(counts)), 1e-12)

    logarithms = _logarithms(energies, reference.typical) - reference.log_energies
    total, _ = joined_sum(release.noised_sum("scales", logarithms, reference.clip_scales), counts)
    noise = release.noise_stddev("scales") / size
    weight = _TYPICAL_LOG_RATIO**2 / (_TYPICAL_LOG_RATIO**2 + noise**2)
    scales = np.exp(np.clip(weight * total / size, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))

    sums = release.noised_sum("energies", energies / (reference.typical * scales), reference.clip_energies)
    stddev = release.noise_stddev("energies")
    own = pooled_means(sums, counts, groups, Variances(noise=stddev**2 * ones, scatter=0 * ones, shape=ones))
    return np.asarray(scales * towards_one(own, stddev / size))


def _release_second_moments(
    shaped: Array, release: NoisedSums, groups: Int64, counts: Array, reference: PublicReference, energies: Array
) -> Array:
    """Covariance of the low block, (classes, low, low), positive definite. energies: (classes,), of the residuals beside public ones.

    Of the axes that `_axes_above` chooses; along the others, and between them, it is the public one. Most images are cut down to the clip
    norm, which tells their directions at half the noise; how strong they are the energies tell.
    """
    noise, public = release.noise_stddev("second_moments"), reference.principal.shaped_variances
    booked = reference.clip_second_moments
    axes = _axes_above(noise / booked, public, patients=float(counts.sum()))
    strongest, clip = slice(len(public) - axes, None), reference.clip_residuals[axes - 1]
    unit = booked / clip**2  # the same clip norm for fewer numbers is less noise on each
    rows, columns = np.triu_indices(axes)
    weight = np.where(rows == columns, 1.0, np.sqrt(2.0))  # the norm of the weighted half is the norm of the matrix
    size = float(counts @ energies / counts.sum())
    kept = clipped(shaped[:, strongest] / np.sqrt(size), clip)
    halves = kept[:, rows] * kept[:, columns] * weight
    total = release.noised_sum("second_moments", halves * unit, booked) / unit
    matrices = np.zeros((len(counts), axes, axes))
    matrices[:, rows, columns] = total / weight
    matrices[:, columns, rows] = matrices[:, rows, columns]
    found = pooled_covariances(matrices, counts, groups, stddev=noise / unit, prior=np.diag(public[strongest]))
    covariances = np.tile(np.diag(public), (len(counts), 1, 1))
    covariances[:, strongest, strongest] = found * (public[strongest].sum() / np.trace(found, axis1=1, axis2=2))[:, None, None]
    covariances *= (energies * reference.typical[-1] / public.sum())[:, None, None]
    return np.stack([reference.principal.unshaped(reference.principal.unshaped(covariance).T) for covariance in covariances])


def _axes_above(noise_multiplier: float, variances: Array, *, patients: float) -> int:
    """How many axes, strongest first, have expected second moments that stand `_ABOVE_NOISE` times above the noise. It follows from public
    numbers and the released number of patients. variances: (axes,) public ones, rising.
    """
    falling = variances[::-1]
    expected = patients * falling / np.cumsum(falling)  # of vectors as long as the clip norm, in units of its square
    return max(min(_FEWEST_AXES, len(variances)), int(np.count_nonzero(expected >= _ABOVE_NOISE * noise_multiplier)))


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
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)))
