"""Stage 4: patients vote for the candidates that are nearest to their images, and images are then drawn around the winners.

The noised histogram of nearest neighbours is the selection of Private Evolution (Lin et al. 2024, algorithm 2). It corrects what moments
and a net with a public past cannot know: how often which kind of image occurs. A patient's contribution is the mean over their images of
one vote each among candidates of the same cell, so by convexity its L2 norm is at most 1, whatever and however many the images are.
Candidates depend on the patients only through what was released before; drawing around the winners is post-processing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsynth.model.noised_sums import Record
from dpsynth.model.thumbnails import thumbnails
from dpsynth.plan import VOTES
from dpsynth.privacy.mechanism import MomentRelease
from dpsynth.privacy.noise import NoiseStream

Array = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

_BLOCK = 512
_VOTES_PER_STDDEV = 0.5  # candidates are so many that one gets this many votes for each standard deviation of the noise, on average
_FEWEST, _MOST = 20, 2000  # candidates: a cell, and in all


@dataclass(frozen=True, kw_only=True)
class Parents:
    """Candidates that images are drawn around. images: (n, channel, *space) in [-1, 1]; cells: (n,); weights: (n,), noised and positive."""

    images: Float32
    cells: Int64
    weights: Array

    def choose(self, cells: Int64, seeds: NDArray[np.uint64]) -> Int64:
        """A parent (n,) for each image from its cell and seed, by weight; -1 where the cell has none."""
        chosen = np.full(len(cells), -1, dtype=np.int64)
        for cell in np.unique(cells):
            members = np.flatnonzero(self.cells == cell)
            rows = np.flatnonzero(cells == cell)
            if len(members):
                steps = np.cumsum(self.weights[members])
                points = np.array([np.random.default_rng([1, int(seed)]).random() for seed in seeds[rows]]) * steps[-1]
                chosen[rows] = members[np.minimum(np.searchsorted(steps, points, side="right"), len(members) - 1)]
        return chosen


def num_candidates(mechanism: MomentRelease, *, declared_patients: int, num_cells: int) -> int:
    """How many candidates there should be, from public numbers: fewer when the noise is large beside the number of patients."""
    wanted = declared_patients / (_VOTES_PER_STDDEV * mechanism.noise_stddev(VOTES.name))
    return int(np.clip(wanted, _FEWEST * num_cells, _MOST))


def count_votes(candidates: Float32, candidate_cells: Int64, images: Float32, cells: Int64, patients: Int64) -> Array:
    """Votes of all patients, (candidates,): each image votes for the nearest candidate of its cell with 1 by its patient's images."""
    votes = np.zeros(len(candidates))
    weight = 1 / np.bincount(patients)[patients]
    theirs = thumbnails(candidates)
    for cell in np.unique(cells):
        among, rows = np.flatnonzero(candidate_cells == cell), np.flatnonzero(cells == cell)
        for start in range(0, len(rows) if len(among) else 0, _BLOCK):
            block = rows[start : start + _BLOCK]
            nearest = (thumbnails(images[block]) @ theirs[among].T).argmax(axis=1)  # of unit vectors, the largest product is the nearest
            np.add.at(votes, among[nearest], weight[block])
    return votes


def release_votes(
    candidates: Float32,
    candidate_cells: Int64,
    images: Float32,
    cells: Int64,
    patients: Int64,
    *,
    mechanism: MomentRelease,
    stream: NoiseStream,
    record: Record,
) -> Parents:
    """The candidates with the votes that they are thought to have; all of a cell in which none is thought to have any."""
    if mechanism.query(VOTES.name).clip_norm != VOTES.clip_norm:
        raise ValueError("The clip norm of the votes is not the booked one.")
    stddev = mechanism.noise_stddev(VOTES.name)
    exact = count_votes(candidates, candidate_cells, images, cells, patients)
    noised = exact + stddev * stream.normal(VOTES.name, _address(candidates, candidate_cells), len(exact))
    record(VOTES.name, exact[None], noised[None])
    weights = _expected_votes(noised, stddev)
    for cell in np.unique(candidate_cells):
        members = candidate_cells == cell
        if not weights[members].any():
            weights[members] = 1.0
    kept = weights > 0
    return Parents(images=candidates[kept], cells=candidate_cells[kept], weights=weights[kept])


def _address(candidates: Float32, cells: Int64) -> int:
    """Where the noise lies in the run's stream. A run that goes on elsewhere may draw candidates that differ in their last bits, and then
    counts other votes: one noise on both would show the difference.
    """
    digest = hashlib.blake2b(np.ascontiguousarray(candidates).tobytes() + cells.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _expected_votes(noised: Array, stddev: float) -> Array:
    """Posterior mean of votes, at least 0, when they scatter normally around their mean by what the noise does not explain."""
    mean = float(noised.mean())
    scatter = max(float(noised.var()) - stddev**2, 0.0)
    return np.maximum(mean + scatter / max(scatter + stddev**2, 1e-12) * (noised - mean), 0.0)
