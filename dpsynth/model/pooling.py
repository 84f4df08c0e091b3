"""Moments from noised sums: each cell leans on its label, each label on all, all on public images, as much as the noise makes it need to.

Everything is computed from sums that were released with noise and from the noise's known size, so it is post-processing and free.
A cell's sum S of n patients is n times its mean, plus noise of variance s^2, plus the patients' own scatter n v. The means of a label's
cells differ by a variance t^2, which is estimated from the sums (DerSimonian and Laird 1986). The posterior mean is then
m + n t^2 / (n^2 t^2 + s^2 + n v) (S - n m) for a label's mean m: S / n where cells are large, m where one is empty. No small count is
divided by, so a cell that drowned in noise does no harm. Of what sets a cell's covariance apart from its label's, a label's from that
of all and this from the public one, the part above the noise is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Int64 = NDArray[np.int64]

_TINY = 1e-12
_TYPICAL_RATIO = 0.5  # how far energies of two hospitals usually differ, as a part: the spread of the prior around the public ones
_SMALLEST_RATIO = 0.05  # of private to public energy


def consistent_counts(noised: Array, smallest: float) -> Array:
    """The non-negative counts nearest to noised ones that sum to their sum (at least `smallest`), so that noise makes no patients.

    Euclidean projection onto the simplex (Duchi et al. 2008, figure 1). noised: (cells,).
    """
    total = max(float(noised.sum()), smallest)
    ordered = np.sort(noised)[::-1]
    excess = (np.cumsum(ordered) - total) / np.arange(1, len(ordered) + 1)
    return np.asarray(np.maximum(noised - excess[np.flatnonzero(ordered > excess)[-1]], 0.0))


@dataclass(frozen=True, kw_only=True)
class Variances:
    """What is known of sums, each (width,): noise s^2, scatter v, and how t^2 is spread over coordinates; its size is estimated."""

    noise: Array
    scatter: Array
    shape: Array


def pooled_means(sums: Array, counts: Array, labels: Int64, variances: Variances) -> Array:
    """Mean of each cell, (cells, width), from noised sums (cells, width), counts (cells,) and the label of each cell (cells,)."""
    n = counts[:, None]
    level = np.maximum(variances.noise + n * variances.scatter, _TINY)
    cells = _Seen(precision=n**2 / level, weighted=n * sums / level)
    members = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    between = _spread(cells, members, variances.shape) * variances.shape
    of_labels = cells.joined(members, between)
    everyone = [np.arange(len(members))]
    between_labels = _spread(of_labels, everyone, variances.shape) * variances.shape
    overall = of_labels.joined(everyone, between_labels).means
    return cells.posterior(of_labels.posterior(overall, between_labels)[labels], between)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What sums tell of means, (groups, width): the precision of each, 0 for an empty cell, and precision times mean."""

    precision: Array
    weighted: Array

    @property
    def means(self) -> Array:
        return np.asarray(self.weighted / np.maximum(self.precision, _TINY))

    def joined(self, groups: list[Int64], between: Array) -> _Seen:
        """What they tell of the means of groups, around which they scatter with variance `between` (width,)."""
        factor = 1 / (1 + between * self.precision)
        return _Seen(
            precision=np.stack([(self.precision * factor)[rows].sum(axis=0) for rows in groups]),
            weighted=np.stack([(self.weighted * factor)[rows].sum(axis=0) for rows in groups]),
        )

    def posterior(self, prior: Array, between: Array) -> Array:
        """Posterior means when the prior has mean `prior` and variance `between`."""
        return np.asarray(prior + between * (self.weighted - self.precision * prior) / (1 + between * self.precision))


def _spread(seen: _Seen, groups: list[Int64], shape: Array) -> float:
    """t^2 by the method of moments: how much more the means within groups differ than their precision explains."""
    excess, expected = np.zeros(len(shape)), np.zeros(len(shape))
    for rows in groups:
        p, means = seen.precision[rows], seen.means[rows]
        total = np.maximum(p.sum(axis=0), _TINY)
        squares = (p * (means - seen.weighted[rows].sum(axis=0) / total) ** 2).sum(axis=0)
        excess += squares - np.maximum((p > 0).sum(axis=0) - 1, 0)
        expected += total - (p**2).sum(axis=0) / total
    # Weights that ignore the precision: else the finest coordinates, where patients scatter least, would speak for the coarse ones.
    return max(0.0, float(shape @ (excess / np.maximum(expected, _TINY)) / (shape @ shape)))


def joined_sum(sums: Array, counts: Array) -> tuple[Array, float]:
    """Sum and count of several cells as one cell with the noise of one: their mean is the one of least noise. sums: (cells, ...)."""
    length = float(np.linalg.norm(counts))
    return np.asarray(np.tensordot(counts, sums, axes=1) / max(length, _TINY)), length


def pooled_covariances(totals: Array, counts: Array, labels: Int64, *, stddev: float, prior: Array) -> Array:
    """Covariance of each cell, (cells, width, width), positive definite, from noised second moments around the cells' means.

    totals: (cells, width, width), sums over patients. stddev: of the noise of each entry on the diagonal. prior: of all cells, public.
    """
    everyone = _near(prior, totals, counts, stddev)
    found = np.empty_like(totals)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        of_label = _near(everyone, totals[members], counts[members], stddev) if len(members) < len(labels) else everyone
        for cell in members:
            found[cell] = _near(of_label, totals[[cell]], counts[[cell]], stddev) if len(members) > 1 else of_label
    return found


def _near(parent: Array, totals: Array, counts: Array, stddev: float) -> Array:
    """The parent in the right size, and a part of what is seen above the noise of how these cells together differ from it.

    With few patients their own scatter is no covariance yet: that part is n / (n + width). The result keeps at least `_SMALLEST_RATIO` of
    the parent in every direction.
    """
    total, count = joined_sum(totals, counts)
    if count < 1:
        return parent
    noised, noise, width, size = total / count, stddev / count, len(parent), np.trace(parent)
    scaled = parent * towards_one(np.trace(noised) / size, noise * np.sqrt(width) / size)
    patients = counts.sum()
    seen = scaled + patients / (patients + width) * _above_noise(noised - scaled, noise)
    root = np.linalg.cholesky(scaled)
    relative = np.linalg.solve(root, np.linalg.solve(root, seen).T)
    values, vectors = np.linalg.eigh((relative + relative.T) / 2)
    half = root @ vectors
    return np.asarray((half * np.maximum(values, _SMALLEST_RATIO)) @ half.T)


def towards_one(noised: Array | float, stddev: Array | float) -> Array:
    """Ratios of private to public energy, released with noise of `stddev`: drawn towards 1 by how much of their spread is noise."""
    weight = _TYPICAL_RATIO**2 / (_TYPICAL_RATIO**2 + np.square(stddev))
    return np.asarray(np.maximum(1 + weight * (np.asarray(noised) - 1), _SMALLEST_RATIO))


def _above_noise(matrix: Array, stddev: float) -> Array:
    """Eigenvalues above the edge of pure noise (semicircle law), shrunk for the least squared error (Donoho et al. 2018, table 2)."""
    values, vectors = np.linalg.eigh(matrix)
    edge = stddev * np.sqrt(2 * len(values))
    largest = edge * (1 + len(values) ** (-2 / 3))  # of noise alone in 99 of 100 cases (Tracy-Widom law)
    kept = np.where(np.abs(values) > largest, np.sign(values) * np.sqrt(np.maximum(values**2 - edge**2, 0)), 0.0)
    return np.asarray((vectors * kept) @ vectors.T)
