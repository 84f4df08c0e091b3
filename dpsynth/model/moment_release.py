"""Stage 1: class-wise moments under differential privacy, by four noised sums over patients, each of which uses what the ones before told.

Of each class: count and sum of the low frequencies; log-energies of their residuals and of the rings of frequency above them (scales);
the same energies in units of these; second moments of the residuals. How a patient's contribution is bounded: `noised_sums`.

What a query asks of each image (`rows_of`) is one function, and what its noised sums tell (`told_by`) another. At one site both are called
in turn; in a federation each site answers the first, and the second reads the sum over the sites, so that several sites tell what one
with all of their patients would, but for the noise.
Another hospital's images may be several times as strong as public ones, so energies are released as logarithms, which no factor drives out
of the clip norm, and residuals are divided by the released size before their second moments are taken.
The low frequencies are released along their principal axes, each divided by the fourth root of its public variance: noise is equal on all
axes, so this puts less of it on the many weak ones. Second moments are released along the axes that stand above the noise, and what the
noise hides is taken from the public ones (`pooling`). With attributes the classes are cells, and small ones lean on their label; the
bound does not depend on what a class is.
Sources: Dwork et al. 2014 (Analyze Gauss) for noised second moments; Liew et al. 2022 for one-shot moments as generators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dpsynth.model.moments import SMALLEST_VARIANCE, Moments, PublicReference, frequencies, log_ratios, summaries, with_residuals
from dpsynth.model.noised_sums import NoisedSums, Record, clipped
from dpsynth.model.pooling import Variances, consistent_counts, joined_sum, pooled_covariances, pooled_means, towards_one
from dpsynth.privacy.mechanism import GaussianQuery, MomentRelease
from dpsynth.privacy.noise import NoiseStream

Array = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

_SHARES = {"means": 0.25, "scales": 0.03, "energies": 0.12, "second_moments": 0.6}
QUERIES = tuple(_SHARES)  # in the order in which they are asked
COUNT_WEIGHT = 0.3  # of the number one in a row of the means, in clip norms of the low frequencies
_ABOVE_NOISE = 16.0  # noise standard deviations of the expected second moment along an axis, for it to be released
_FEWEST_AXES = 12  # released whatever the noise: with less than 78 numbers of a class nobody could tell whether the booked noise was added
_TYPICAL_LOG_RATIO, _LARGEST_LOG_RATIO = np.log(2.0), np.log(20.0)  # spread of energies beside public ones, and what is never believed


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the queries so far have told; None before the query that tells it.

    counts: (classes,); mean: (classes, low); scales: (bands + 1,) and energies: (classes, bands + 1), of the rings and, last, of the
    shaped residuals, as multiples of the public ones; covariance: (classes, low, low). axes: along how many of the strongest axes
    second moments are taken.
    """

    counts: Array | None = None
    mean: Array | None = None
    scales: Array | None = None
    energies: Array | None = None
    axes: int | None = None
    covariance: Array | None = None

    @property
    def size(self) -> float:
        """Energy of all patients' residuals beside the public one."""
        counts, energies = _known(self.counts), _known(self.energies)
        return float(counts @ energies[:, -1] / counts.sum())

    def moments(self, reference: PublicReference) -> Moments:
        """All of it as moments, once the last query has been told."""
        layout = frequencies(reference.shape, reference.low_frequencies)
        variance = np.maximum(_known(self.energies)[:, layout.band] * reference.spectrum, SMALLEST_VARIANCE)
        variance[:, layout.low] = 0
        return Moments(
            shape=reference.shape,
            low_frequencies=reference.low_frequencies,
            counts=_known(self.counts),
            mean=_known(self.mean),
            covariance=_known(self.covariance),
            variance=variance,
        )


def _known(value: Array | None) -> Array:
    if value is None:
        raise ValueError("Expected an earlier query to have told this.")
    return value


def told_before(query: str, num_classes: int, reference: PublicReference) -> dict[str, tuple[int, ...]]:
    """Names and shapes, as arrays, of what the queries before one have told."""
    low, energies = len(reference.principal.variances), len(reference.typical)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "means": {"counts": (num_classes,), "mean": (num_classes, low)},
        "scales": {"scales": (energies,)},
        "energies": {"energies": (num_classes, energies), "axes": (1,)},
    }
    return {name: shape for earlier in QUERIES[: QUERIES.index(query)] for name, shape in shapes[earlier].items()}


def fewest_axes(all_axes: int) -> int:
    """Along how many of so many axes second moments are taken at least, so that the noise on them can be told."""
    return min(_FEWEST_AXES, all_axes)


def _count_number(reference: PublicReference) -> float:
    """What a patient adds to the count, beside sums of low frequencies."""
    return COUNT_WEIGHT * reference.clip_low


def moment_queries(reference: PublicReference) -> tuple[GaussianQuery, ...]:
    """The queries of the release with their clip norms."""
    norms = {
        "means": float(np.hypot(_count_number(reference), reference.clip_low)),
        "scales": reference.clip_scales,
        "energies": reference.clip_energies,
        "second_moments": reference.clip_second_moments,
    }
    return tuple(GaussianQuery(name=name, share=share, clip_norm=norms[name]) for name, share in _SHARES.items())


def count_stddev(mechanism: MomentRelease, reference: PublicReference) -> float:
    """Standard deviation of the noise on the count of each class, in patients."""
    return mechanism.noise_stddev("means") / _count_number(reference)


@dataclass(frozen=True, kw_only=True)
class Summaries:
    """Of each image its low frequencies (n, low), its energies by ring (n, bands) and its label (n,): all that the queries read."""

    low: Array
    bands: Array
    labels: Int64

    @classmethod
    def of(cls, images: Float32, labels: Int64, reference: PublicReference) -> Summaries:
        """Of images (n, channel, *space)."""
        low, bands, _ = summaries(images, frequencies(reference.shape, reference.low_frequencies))
        return cls(low=low, bands=bands, labels=labels)

    def part(self, part: slice) -> Summaries:
        """Of some of the images."""
        return Summaries(low=self.low[part], bands=self.bands[part], labels=self.labels[part])

    def shaped(self, told: Told, reference: PublicReference) -> Array:
        """Residuals around the released means of the classes, shaped, (n, low)."""
        return reference.principal.shaped(self.low - _known(told.mean)[self.labels])


def rows_of(query: str, images: Summaries, told: Told, reference: PublicReference) -> Array:
    """What a query asks of each image, (n, width). Whoever sums the rows clips them to the query's clip norm, whatever `told` holds."""
    ask: Mapping[str, Callable[[Summaries, Told, PublicReference], Array]] = {
        "means": _rows_of_means,
        "scales": _rows_of_scales,
        "energies": _rows_of_energies,
        "second_moments": _rows_of_second_moments,
    }
    with np.errstate(all="ignore"):  # what somebody else told may be anything; rows that are not finite count as zero
        return ask[query](images, told, reference)


def noised_answer(query: GaussianQuery, images: Summaries, told: Told, reference: PublicReference, release: NoisedSums) -> Array:
    """The noised sums (classes, width) of a query over all patients."""
    return release.noised_sum(query.name, lambda part: rows_of(query.name, images.part(part), told, reference), query.clip_norm)


def width_of(query: str, told: Told, reference: PublicReference) -> int:
    """Numbers in a row of a query."""
    low, axes = len(reference.principal.variances), told.axes or 0
    return {"means": low + 1, "second_moments": axes * (axes + 1) // 2}.get(query, len(reference.typical))


def told_by(query: str, sums: Array, told: Told, groups: Int64, reference: PublicReference, noise: Callable[[str], float]) -> Told:
    """All that is known after a query whose noised sums are `sums` (classes, width).

    groups: (classes,), the label that each class leans on. noise: by query the standard deviation of the noise on each number of its sums.
    """
    if query == "means":
        counts, mean = _means(sums, groups, reference, noise(query))
        return replace(told, counts=counts, mean=mean)
    counts = _known(told.counts)
    if query == "scales":
        return replace(told, scales=_scales(sums, counts, noise(query)))
    if query == "energies":
        energies = _known(told.scales) * _energies(sums, counts, groups, noise(query))
        multiplier = noise("second_moments") / reference.clip_second_moments
        axes = _axes_above(multiplier, reference.principal.shaped_variances, patients=float(counts.sum()))
        return replace(told, energies=energies, axes=axes)
    return replace(told, covariance=_covariance(sums, told, groups, reference, noise(query)))


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
    release = NoisedSums(labels=labels, patients=patients, num_classes=num_classes, mechanism=mechanism, stream=stream, record=record)
    groups = np.arange(num_classes) if labels_of_cells is None else labels_of_cells
    found, told = Summaries.of(images, labels, reference), Told()
    for query in moment_queries(reference):
        sums = noised_answer(query, found, told, reference, release)
        told = told_by(query.name, sums, told, groups, reference, release.noise_stddev)
    return told.moments(reference)


def _rows_of_means(images: Summaries, _: Told, reference: PublicReference) -> Array:
    kept = clipped(reference.principal.shaped(images.low - reference.centre), reference.clip_low)
    return np.concatenate([np.full((len(kept), 1), _count_number(reference)), kept], axis=1)


def counts_of(raw: Array, *, stddev: float) -> Array:
    """Counts (classes,) that patients can have, from noised ones."""
    return consistent_counts(raw, max(1.0, 2 * stddev))


def raw_counts(sums: Array, reference: PublicReference) -> Array:
    """Noisy counts (classes,) in the noised sums of the means; negative ones are left so."""
    return np.asarray(sums[:, 0] / _count_number(reference))


def _means(sums: Array, groups: Int64, reference: PublicReference, stddev: float) -> tuple[Array, Array]:
    """Counts (classes,) and means (classes, low)."""
    weight = _count_number(reference)
    counts = counts_of(raw_counts(sums, reference), stddev=stddev / weight)
    joined, count = joined_sum(sums[:, 1:], counts)
    uncertain_count = (stddev / weight * joined / max(count, 1e-12)) ** 2
    public = reference.principal.shaped_variances  # patients scatter, and classes are thought to differ, as public images do
    variances = Variances(noise=stddev**2 + uncertain_count, scatter=public if stddev else 0 * public, shape=public)
    mean = pooled_means(sums[:, 1:], counts, groups, variances)
    return counts, reference.centre + reference.principal.unshaped(mean)


def _rows_of_scales(images: Summaries, told: Told, reference: PublicReference) -> Array:
    energies = with_residuals(images.bands, images.shaped(told, reference))
    return log_ratios(energies, reference.typical) - reference.log_energies


def _scales(sums: Array, counts: Array, stddev: float) -> Array:
    """How strong energies are beside public ones, over all classes: (bands + 1,). From logarithms, since they may be far from them."""
    total, _ = joined_sum(sums, counts)
    size = max(float(np.linalg.norm(counts)), 1e-12)
    weight = _TYPICAL_LOG_RATIO**2 / (_TYPICAL_LOG_RATIO**2 + (stddev / size) ** 2)
    return np.asarray(np.exp(np.clip(weight * total / size, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)))


def _rows_of_energies(images: Summaries, told: Told, reference: PublicReference) -> Array:
    return with_residuals(images.bands, images.shaped(told, reference)) / (reference.typical * _known(told.scales))


def _energies(sums: Array, counts: Array, groups: Int64, stddev: float) -> Array:
    """Mean energies of each class in units of the scales, (classes, bands + 1)."""
    ones = np.ones(sums.shape[1])
    own = pooled_means(sums, counts, groups, Variances(noise=stddev**2 * ones, scatter=0 * ones, shape=ones))
    return towards_one(own, stddev / max(float(np.linalg.norm(counts)), 1e-12))


def _strongest(told: Told, reference: PublicReference) -> tuple[slice, float]:
    """The axes of the second moments, and the norm that their residuals are cut down to."""
    axes, width = told.axes or 0, len(reference.principal.variances)
    return slice(width - axes, None), float(reference.clip_residuals[axes - 1])


def _rows_of_second_moments(images: Summaries, told: Told, reference: PublicReference) -> Array:
    """The upper half of the residuals' outer products, its norm that of the whole, with the booked clip norm whatever the axes.

    Most images are cut down to the clip norm, which tells their directions at half the noise; how strong they are the energies tell.
    """
    strongest, clip = _strongest(told, reference)
    kept = clipped(images.shaped(told, reference)[:, strongest] / np.sqrt(told.size), clip)
    rows, columns = np.triu_indices(kept.shape[1])
    weight = np.where(rows == columns, 1.0, np.sqrt(2.0))
    return np.asarray(kept[:, rows] * kept[:, columns] * weight * (reference.clip_second_moments / clip**2))


def _covariance(sums: Array, told: Told, groups: Int64, reference: PublicReference, stddev: float) -> Array:
    """Covariance of the low block, (classes, low, low), positive definite.

    Of the strongest axes; along the others, and between them, it is the public one.
    """
    public, counts, energies = reference.principal.shaped_variances, _known(told.counts), _known(told.energies)[:, -1]
    strongest, clip = _strongest(told, reference)
    unit = reference.clip_second_moments / clip**2  # the same clip norm for fewer numbers is less noise on each
    axes = len(public[strongest])
    rows, columns = np.triu_indices(axes)
    matrices = np.zeros((len(counts), axes, axes))
    matrices[:, rows, columns] = sums / unit / np.where(rows == columns, 1.0, np.sqrt(2.0))
    matrices[:, columns, rows] = matrices[:, rows, columns]
    found = pooled_covariances(matrices, counts, groups, stddev=stddev / unit, prior=np.diag(public[strongest]))
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
    return max(fewest_axes(len(variances)), int(np.count_nonzero(expected >= _ABOVE_NOISE * noise_multiplier)))
