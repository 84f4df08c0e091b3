"""Which patient each image lies nearest to, and how much nearer than to other patients, whatever was done to the copy.

Images are compared by normalised thumbnails, which forget brightness and contrast, and by what these have beyond the mean of all real
ones; every real image is also laid down mirrored, shifted, turned, enlarged and shrunk a little, upside down, on its side and as its
negative. Volumes are compared whole and slice by slice along each axis. "Other patients" are the third nearest: a person whose images are
there under two ids would hide behind the second. The search works in blocks of float32 products: no matrix of all images against all
images is ever held, so that 100,000 against 100,000 fits into memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dpsynth.checks.kept import Arrays, Keep, keep_nothing
from dpsynth.data.cohort import Float32, Int64
from dpsynth.model.thumbnails import averaged_down, thumbnails
from dpsynth.progress import Progress

Array = NDArray[np.float64]
_ROWS_PER_BLOCK, _QUERIES_PER_BLOCK = 16_384, 512
_ROWS_PER_MEAN = 1024
_IMAGES_PER_PART = 8192  # real images, after whose search what was found is kept
_SHIFT, _TURN, _ZOOMS = 0.07, math.radians(4), (0.85, 0.92, 1.08, 1.16)
_MOST_SLICES = 32
_LEAST_CONTENT = 0.75  # of the standard deviation of the volume's fullest slice: emptier ones are alike without being copies
_NEAREST = 3
_SOFTENING = 0.02  # of distances (at most 2) before they are divided: two nearly empty slices are not a copy

Kind = Callable[[Float32, bool], tuple[Float32, Int64]]  # rows (m, d) of images, with their variants or without, and whose they are


@dataclass(frozen=True, kw_only=True)
class Approaches:
    """For each query: the image it is of, the nearest patient, and the distance to them as part of that to the third nearest.

    copy: the ratio that an exact copy of the query would have, were the query one of the patients. kind: how it was compared (0: whole,
    1 to 3: slices along an axis).
    """

    item: Int64
    patient: Int64
    ratio: Array
    copy: Array
    kind: Int64

    @classmethod
    def among(cls, nearest: Nearest, item: Int64, *, kind: int = 0) -> Approaches:
        """From distances to the nearest patients."""
        first, second, third = nearest.distances.T + _SOFTENING
        return cls(item=item, patient=nearest.patient, ratio=first / third, copy=_SOFTENING / second, kind=np.full(len(item), kind))

    def relative_to(self, usual: Array) -> Approaches:
        """The same with all ratios as parts of what is `usual` (kinds,) for their kind."""
        return replace(self, ratio=self.ratio / usual[self.kind], copy=self.copy / usual[self.kind])

    def where(self, chosen: NDArray[np.bool_]) -> Approaches:
        """Those chosen."""
        return Approaches(**{name: array[chosen] for name, array in self.__dict__.items()})

    def per_patient(self, num_patients: int) -> Array:
        """Smallest ratio with which each patient was approached (num_patients,); infinite when nobody came nearest to them."""
        smallest = np.full(num_patients, np.inf)
        np.minimum.at(smallest, self.patient, self.ratio)
        return smallest

    def of(self, start: int, stop: int) -> Approaches:
        """Those of the images numbered `start` to `stop`, numbered from 0."""
        found = self.where((self.item >= start) & (self.item < stop))
        return replace(found, item=found.item - start)

    def per_item(self, num_items: int) -> tuple[Array, Int64]:
        """Smallest ratio of each image and the patient whom it approaches, (num_items,) each."""
        order = np.lexsort((self.ratio, self.item))
        first = order[np.searchsorted(self.item[order], np.arange(num_items))]
        return self.ratio[first], self.patient[first]


def approaches(
    images: Float32, real: Float32, patients: Int64, *, own: Int64 | None = None, progress: Progress, keep: Keep = keep_nothing
) -> Approaches:
    """Search `images` (n, channel, *space) among the `real` ones of `patients`, leaving out each one's `own` patient (-1: nobody).

    The search of each part of the real images is kept, so one of hours goes on after a kill.
    """
    parts = []
    kinds = [_whole] if images.ndim == 4 else [_whole, *(_along(axis) for axis in (2, 3, 4))]
    for number, way in enumerate(kinds):
        kind = apart_from_common(way, real)
        queries, item = kind(images, False)
        excluded = None if own is None else own[item]
        nearest, done = Nearest.nobody(len(queries)), number * len(real)
        for part, rows in enumerate(_in_parts(patients, _IMAGES_PER_PART)):
            note = partial(_note, progress, done, len(kinds) * len(real))
            search = partial(_searched, queries, _blocks(real, patients, rows, kind, note), excluded)
            nearest, done = nearest.or_of(Nearest(**keep(f"search {number}-{part}", search))), done + len(rows)
        found = Approaches.among(nearest, item, kind=number)
        nothing = np.linalg.norm(queries, axis=1) < 0.5  # a copy of what has nothing to compare is told from nobody
        parts.append(replace(found, copy=np.where(nothing, np.inf, found.copy)))
    return Approaches(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in parts[0].__dict__})


def apart_from_common(kind: Kind, real: Float32) -> Kind:
    """The same way of comparing, by what an image has beyond the mean of all `real` ones: frames, scale bars and a common outline would
    make everybody alike. The mean is of both sides of the pool, so it does not depend on the coins."""
    parts = [kind(real[start : start + _ROWS_PER_MEAN], False)[0] for start in range(0, len(real), _ROWS_PER_MEAN)]
    common = np.sum([part.sum(axis=0, dtype=np.float64) for part in parts], axis=0) / sum(len(part) for part in parts)

    def rows(images: Float32, variants: bool) -> tuple[Float32, Int64]:
        laid, item = kind(images, variants)
        blank = np.linalg.norm(laid, axis=1, keepdims=True) < 0.5  # thumbnails have norm 1, or 0: then there is nothing to compare
        laid = np.where(blank, np.float32(0), laid - common.astype(np.float32))
        return laid / np.maximum(np.linalg.norm(laid, axis=1, keepdims=True), np.float32(1e-6)), item

    return rows


def _note(progress: Progress, before: int, total: int, done: int) -> None:
    progress("search for copies", before + done, total)


def _searched(queries: Float32, blocks: Iterable[tuple[Float32, Int64]], own: Int64 | None) -> Arrays:
    return dict(nearest_patients(queries, blocks, own=own).__dict__)


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """patient (n,): nearest; distances (n, 3): to the three nearest patients, rising (infinite where there are fewer)."""

    patient: Int64
    distances: Array

    @classmethod
    def nobody(cls, count: int) -> Nearest:
        """Before anybody was looked at."""
        return cls(patient=np.full(count, -1, dtype=np.int64), distances=np.full((count, _NEAREST), np.inf))

    def or_of(self, other: Nearest) -> Nearest:
        """Among these patients and others, of whom none is the same."""
        nearer = other.distances[:, 0] < self.distances[:, 0]
        together = np.concatenate([self.distances, other.distances], axis=1)
        return Nearest(patient=np.where(nearer, other.patient, self.patient), distances=np.sort(together, axis=1)[:, :_NEAREST])


def nearest_patients(queries: Float32, blocks: Iterable[tuple[Float32, Int64]], *, own: Int64 | None = None) -> Nearest:
    """The nearest patients of rows of norm 1 (or 0) (n, d). Blocks of rows hold all rows of a patient, next to each other."""
    n = len(queries)
    best, patient = np.full((n, _NEAREST), -np.inf, np.float32), np.full(n, -1, np.int64)
    for rows, owners in blocks:
        starts = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]])
        numbers = owners[starts]
        for start in range(0, n, _QUERIES_PER_BLOCK):
            part = slice(start, min(start + _QUERIES_PER_BLOCK, n))
            similar = np.maximum.reduceat(queries[part] @ rows.T, starts, axis=1)
            if own is not None:
                similar[own[part, None] == numbers[None]] = -np.inf
            index = np.arange(len(similar))
            top, nearest = np.empty((len(similar), _NEAREST), np.float32), similar.argmax(axis=1)
            for rank in range(_NEAREST):
                column = similar.argmax(axis=1) if rank else nearest
                top[:, rank] = similar[index, column]
                similar[index, column] = -np.inf
            patient[part] = np.where(top[:, 0] > best[part, 0], numbers[nearest], patient[part])
            best[part] = -np.sort(-np.concatenate([best[part], top], axis=1), axis=1)[:, :_NEAREST]
    return Nearest(patient=patient, distances=_distance(best))


def _distance(similar: NDArray[np.float32]) -> Array:
    return np.asarray(np.sqrt(np.maximum(2 - 2 * similar.astype(np.float64), 0)))


def _in_parts(patients: Int64, size: int) -> Iterator[Int64]:
    """Rows, patient after patient, in parts of about `size`, none of which splits a patient."""
    order = np.argsort(patients, kind="stable")
    bounds = np.flatnonzero(np.r_[True, np.diff(patients[order]) != 0, True])
    start = 0
    while start < len(bounds) - 1:
        stop = start + 1
        while stop < len(bounds) - 1 and bounds[stop + 1] - bounds[start] <= size:
            stop += 1
        yield order[bounds[start] : bounds[stop]]
        start = stop


def _blocks(real: Float32, patients: Int64, rows: Int64, kind: Kind, note: Callable[[int], None]) -> Iterator[tuple[Float32, Int64]]:
    """What lies next to each other of all variants of these rows of real images, patient after patient."""
    rows_per_image, done = len(kind(real[:1], True)[0]), 0
    for part in _in_parts(patients[rows], max(1, _ROWS_PER_BLOCK // rows_per_image)):
        chosen = rows[part]
        laid, item = kind(real[chosen], True)
        by_patient = np.argsort(patients[chosen][item], kind="stable")
        yield laid[by_patient], patients[chosen][item][by_patient]
        done += len(part)
        note(done)


def _whole(images: Float32, variants: bool) -> tuple[Float32, Int64]:
    """Thumbnails of whole images, (n, d) or, variants among them, (v * n, d); and whose they are."""
    tensor = torch.from_numpy(np.nan_to_num(images, nan=0.0, posinf=1.0, neginf=-1.0)).mean(1, keepdim=True)
    laid = [averaged_down(part) for part in (_variants(tensor) if variants else [tensor])]
    if variants:
        plain, left_to_right = laid[0], -1 if tensor.dim() == 4 else -3  # volumes lie right, anterior, superior
        laid += [part.flip(left_to_right) for part in laid]  # to average down does not know sides, so mirroring can come after it
        laid += [plain.flip(axis) for axis in range(2 - tensor.dim(), 0) if axis != left_to_right] + [-plain]
        if tensor.dim() == 4 and plain.shape[2] == plain.shape[3]:
            laid += [plain.flip(-1, -2), *(plain.rot90(turns, (2, 3)) for turns in (1, 3)), plain.mT, plain.flip(-1, -2).mT]
    rows = np.concatenate([thumbnails(part.numpy()).astype(np.float32) for part in laid])
    return rows, np.tile(np.arange(len(images), dtype=np.int64), len(laid))


def _along(axis: int) -> Kind:
    """The slices of volumes along one axis, at most 32 evenly spread, each as an image; as variants mirrored either way, and those with
    little in them blank. Queries keep theirs: a copied slice may have come into a volume with fuller ones."""

    def slices(images: Float32, variants: bool) -> tuple[Float32, Int64]:
        extent = images.shape[axis]
        chosen = np.unique(np.linspace(0, extent - 1, min(extent, _MOST_SLICES)).round().astype(np.int64))
        pictures = np.moveaxis(np.take(images, chosen, axis=axis), axis, 1).reshape(-1, *np.delete(images.shape[1:], axis - 1))
        item = np.repeat(np.arange(len(images), dtype=np.int64), len(chosen))
        if variants:
            content = pictures.reshape(len(images), len(chosen), -1).std(axis=2)
            empty = content < _LEAST_CONTENT * content.max(axis=1, keepdims=True)
            pictures = np.where(empty.reshape(-1, 1, 1, 1), np.float32(0), pictures)
        mirrored = [pictures[..., ::-1], pictures[..., ::-1, :]] if variants else []
        laid = [pictures, *(np.ascontiguousarray(part) for part in mirrored)]
        return np.concatenate([thumbnails(part).astype(np.float32) for part in laid]), np.tile(item, len(laid))

    return slices


def _variants(images: Tensor) -> Iterator[Tensor]:
    """Every way but mirrored in which (n, 1, *space) may have been copied: as it is, shifted, turned, enlarged, shrunk."""
    dimensions = images.dim() - 2
    halves = itertools.product((-1, -0.5, 0, 0.5, 1), repeat=dimensions)  # thumbnails alone do not forgive half of their pixels
    shifts = [steps for steps in halves if any(steps) and (dimensions == 2 or np.count_nonzero(steps) == 1)]
    matrices = [_affine(dimensions, shift=tuple(2 * _SHIFT * step for step in steps)) for steps in shifts]
    matrices += [_affine(dimensions, turn=sign * _TURN) for sign in (-1, 1)]
    matrices += [_affine(dimensions, zoom=zoom) for zoom in _ZOOMS]
    yield images
    yield from (_resampled(images, matrix) for matrix in matrices)


def _affine(dimensions: int, *, shift: tuple[float, ...] = (), turn: float = 0.0, zoom: float = 1.0) -> Tensor:
    """Matrix (d, d + 1) in torch's coordinates from -1 to 1; the turn is in the plane of the last two axes."""
    matrix = torch.eye(dimensions, dimensions + 1) * zoom
    cosine, sine = math.cos(turn), math.sin(turn)
    matrix[:2, :2] = zoom * torch.tensor([[cosine, -sine], [sine, cosine]])
    if shift:
        matrix[:, -1] = torch.tensor(shift)
    return matrix


def _resampled(images: Tensor, matrix: Tensor) -> Tensor:
    grid = F.affine_grid(matrix[None], [1, *images.shape[1:]], align_corners=False).expand(len(images), *[-1] * (images.dim() - 1))
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
