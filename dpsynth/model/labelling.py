"""Labels that mean in synthetic images what they mean in private ones: as few are exchanged as give the released class means.

A generator's noise falls on hundreds of numbers of each class, and a classifier that learns from its images takes the differences that
noise made for signs of the class. The class means of a few descriptors (`descriptors`) are known far better for the same epsilon. So the
images are drawn as ever, and then labels are exchanged among them until the class means of the descriptors are the released ones, as
nearly as these are known. An image leaves its label only for one that gains on it under an exponential tilt (Csiszar 1975), and each
constraint is relaxed by its standard error (Dudik et al. 2007): what noise alone can explain exchanges nothing, not one label. How often
a label occurs stays what it was.
The release is two queries: where the descriptors lie, with a wide clip norm and of all classes together; and how each class lies to that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, minimize

from dpsynth.cells import Cells
from dpsynth.model.descriptors import PublicDescriptors, descriptors
from dpsynth.model.noised_sums import NoisedSums, clipped
from dpsynth.model.pooling import Variances, joined_sum, pooled_means
from dpsynth.privacy.mechanism import GaussianQuery

Array = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

_SHARES = {"descriptor_location": 0.02, "descriptors": 0.1}
_BLOCK = 500  # labels are exchanged among so many images: the time of an assignment is cubic
_EXCHANGED = 0.03  # probability to leave a label at a gain of log 2; the smaller, the more it is those who gain most that leave
_RIDGE = 0.1  # of the tilt in standard deviations: synthetic descriptors vary otherwise than real ones, so no mean is met at any cost
_LARGEST_TILT = 20.0  # log-odds for one standard deviation of a descriptor: that an unreachable mean stays unreached
_ROUNDS = 300


def label_queries(public: PublicDescriptors) -> tuple[GaussianQuery, ...]:
    """The queries of the release with their clip norms."""
    norms = {"descriptor_location": public.clip_location, "descriptors": public.clip_norm}
    return tuple(GaussianQuery(name=name, share=share, clip_norm=norms[name]) for name, share in _SHARES.items())


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """Noised class means. projection: (features, features) takes descriptors to shaped ones, which lie around location (features,) and are
    clipped to clip_norm (1,) from there; means: (cells, features) of these; variances: (cells, features), how uncertain they are.
    """

    projection: Array
    location: Array
    clip_norm: Array
    means: Array
    variances: Array

    @classmethod
    def under(cls, public: PublicDescriptors, *, location: Array, means: Array, variances: Array) -> Labelling:
        """With the projection and the clip norm that everybody knows."""
        projection = public.principal.shaped(np.eye(len(public.principal.shaped_variances)))
        return cls(projection=projection, location=location, clip_norm=np.array([public.clip_norm]), means=means, variances=variances)

    def to_arrays(self, public: PublicDescriptors) -> dict[str, Array]:
        """What is not public. Location and means as descriptors: the signs of principal axes differ from machine to machine."""
        back = public.principal.unshaped
        return {"location": back(self.location), "means": back(self.means), "variances": self.variances}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], public: PublicDescriptors) -> Labelling:
        """Inverse of `to_arrays` where the same public images are known."""
        location, means = (public.principal.shaped(arrays[name]) for name in ("location", "means"))
        return cls.under(public, location=location, means=means, variances=arrays["variances"])

    def labelled(self, images: Float32, cells: Int64, layout: Cells, *, seed: int) -> Int64:
        """Cells (n,) in which labels are exchanged among images (n, channel, *space) of the same attributes.

        A function of the images, cells and seed alone. How often each cell occurs does not change.
        """
        found, rng = cells.copy(), np.random.default_rng(seed)
        shaped = clipped(descriptors(images) @ self.projection - self.location, float(self.clip_norm[0]))  # as the private ones were
        step = len(layout) // len(layout.classes)  # between the cells of two labels: the label varies slowest
        for value in range(step):
            rows = np.flatnonzero(cells % step == value)
            labels = layout.labels(cells[rows])
            present = np.unique(labels)
            if len(present) < 2:
                continue
            of_labels = present * step + value
            likely = moved(shaped[rows], np.searchsorted(present, labels), self.means[of_labels], self.variances[of_labels])
            drawn = np.log(likely + 1e-12) + rng.gumbel(size=likely.shape)  # the largest of a row is a draw from its probabilities
            found[rows] = of_labels[exchanged(drawn, np.searchsorted(present, labels))]
        return found


def moved(rows: Array, labels: Int64, means: Array, variances: Array) -> Array:
    """Probabilities of each label, (n, labels), given an image and the label it was drawn for: 1 for that one where no mean asks for more.

    rows: (n, features); labels: (n,), each occurring; means, variances: (labels, features), of the wanted class means.
    """
    n = len(rows)
    own = np.eye(len(means))[labels]
    counts = own.sum(axis=0)
    shares, scale = counts / n, rows.std(axis=0) + 1e-9
    rows = (rows - rows.mean(axis=0)) / scale
    wanted = counts[:, None] * (means - shares @ means) / scale
    room = counts[:, None] * np.sqrt(variances / scale**2 + 1 / counts[:, None])  # the synthetic images are a sample, too
    rows = np.concatenate([rows, np.ones((n, 1))], axis=1)  # the last constraint is the counts
    wanted, room = np.column_stack([wanted, counts]) - own.T @ rows, np.column_stack([room, np.zeros(len(counts))])
    ridge = n * _RIDGE * np.append(np.ones(len(means[0])), 0.0)

    def dual(flat: Array) -> tuple[float, Array]:
        up, down = flat.reshape(2, *wanted.shape)
        tilt = up - down
        potential, leaves = _leaving(rows @ tilt.T, own)
        excess = (leaves - own * leaves.sum(axis=1, keepdims=True)).T @ rows - wanted + ridge * tilt
        value = potential - (tilt * wanted).sum() + (room * (up + down)).sum() + (ridge * tilt**2).sum() / 2
        return float(value) / n, np.concatenate([(room + excess).ravel(), (room - excess).ravel()]) / n

    bounds = [(0.0, _LARGEST_TILT)] * (2 * wanted.size)
    found = minimize(dual, np.zeros(2 * wanted.size), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _ROUNDS})
    up, down = found.x.reshape(2, *wanted.shape)
    _, leaves = _leaving(rows @ (up - down).T, own)
    leaves /= np.maximum(leaves.sum(axis=1, keepdims=True), 1.0)  # above 1 by a trace where a gain passes 1 / _EXCHANGED
    return np.asarray(leaves + own * (1 - leaves.sum(axis=1, keepdims=True)))


def _leaving(logits: Array, own: Array) -> tuple[float, Array]:
    """Probability with which each image leaves its own label for another, (n, labels), and the convex potential whose slope it is.

    Nothing moves that gains nothing: about _EXCHANGED * (exp(gain) - 1) of a gain in log-odds above 0, and for large gains a softmax.
    """
    gain = np.maximum((logits - (own * logits).sum(axis=1, keepdims=True)) * (1 - own), 0.0)
    total = 1 + _EXCHANGED * (np.expm1(gain) - gain).sum(axis=1, keepdims=True)
    return float(np.log(total).sum()), _EXCHANGED * np.expm1(gain) / total


def exchanged(scores: Array, labels: Int64) -> Int64:
    """The labels (n,) exchanged among images, in blocks, so that the sum of their scores (n, labels) is the largest (Kuhn 1955)."""
    found = labels.copy()
    for start in range(0, len(labels), _BLOCK):
        block = slice(start, start + _BLOCK)
        image, place = linear_sum_assignment(scores[block][:, labels[block]], maximize=True)
        found[start + image] = labels[block][place]
    return found


def release_labelling(images: Float32, sums: NoisedSums, *, counts: Array, groups: Int64, public: PublicDescriptors) -> Labelling:
    """Noised class means of the descriptors of images (n, channel, *space).

    counts: (cells,), as released; groups: (cells,), the label that each cell leans on.
    """
    shaped = public.shaped(descriptors(images))
    variances = public.principal.shaped_variances
    size = max(float(np.linalg.norm(counts)), 1e-12)
    total, _ = joined_sum(sums.noised_sum("descriptor_location", shaped, public.clip_location), counts)
    noise = sums.noise_stddev("descriptor_location") / size
    location = variances / (variances + noise**2) * total / size  # the nearer to the public centre the less is known
    (location,) = clipped(location[None], public.clip_location)  # where the truth lies, so noise alone leads out of it
    rows = clipped(shaped - location, public.clip_norm)
    stddev = sums.noise_stddev("descriptors")
    known = Variances(noise=np.full(len(variances), stddev**2), scatter=variances if stddev else 0 * variances, shape=variances)
    means = pooled_means(sums.noised_sum("descriptors", rows, public.clip_norm), counts, groups, known)
    patients = np.maximum(counts, 1.0)[:, None]
    return Labelling.under(
        public,
        location=public.principal.shaped(public.centre) + location,
        means=clipped(means, public.clip_norm),
        variances=(stddev**2 + patients * variances) / patients**2,
    )
