"""The same picture, or the same person, under two patient ids: the guarantee protects an id, so whoever has two is protected by half."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from dpsynth.audit.finding import Finding, Kind
from dpsynth.checks.features import mirrored
from dpsynth.data.cohort import Float32, Int64
from dpsynth.model.thumbnails import thumbnails
from dpsynth.progress import Progress

SIMILAR = 0.995  # correlation of thumbnails; of 6,000 pairs of nearest images of different people none came above 0.99 (docs/audit.md)
_BLOCK = 512


def similar_pairs(images: Float32, patients: Int64, *, progress: Progress) -> list[tuple[int, int, float]]:
    """Pairs (row, later row, correlation) of images (n, channel, *space) in [-1, 1] of different patients, mirrored or not."""
    rows, flipped = thumbnails(images), thumbnails(mirrored(images))
    found = []
    for start in range(0, len(rows), _BLOCK):
        part = slice(start, start + _BLOCK)
        correlation = np.maximum(rows[part] @ rows.T, flipped[part] @ rows.T)
        for i, j in np.argwhere((correlation > SIMILAR) & (patients[part, None] != patients[None])):
            if start + i < j:
                found.append((int(start + i), int(j), float(correlation[i, j])))
        progress("compare images", min(start + _BLOCK, len(rows)), len(rows))
    return found


def doubles(images: Float32, patients: Int64, ids: Sequence[str], names: Sequence[str], *, progress: Progress) -> list[Finding]:
    """One finding for each pair of patients, numbered as in `ids`, with a similar pair of images: one person, when all images of the
    smaller series have a double in the other and there are at least two; otherwise near-duplicate images. Proposed to go: the images of
    the smaller series that matched."""
    by_people: dict[tuple[int, int], list[tuple[int, int, float]]] = defaultdict(list)
    for first, second, value in similar_pairs(images, patients, progress=progress):
        a, b = (first, second) if patients[first] < patients[second] else (second, first)
        by_people[int(patients[a]), int(patients[b])].append((a, b, value))
    counts = np.bincount(patients)
    return [
        _finding(pairs, people=(ids[p], ids[q]), sizes=(int(counts[p]), int(counts[q])), names=names)
        for (p, q), pairs in sorted(by_people.items())
    ]


def _finding(pairs: list[tuple[int, int, float]], *, people: tuple[str, str], sizes: tuple[int, int], names: Sequence[str]) -> Finding:
    side = 1 if sizes[1] <= sizes[0] else 0
    matched = sorted({(a, b)[side] for a, b, _ in pairs})
    whole = len(matched) == sizes[side] >= 2
    strongest = max(pairs, key=lambda pair: pair[2])
    merge = "; if it is one person, give both one id in the table rather than leave images out" if whole else ""
    return Finding(
        kind=Kind.PERSON if whole else Kind.DOUBLE,
        images=tuple(names[row] for row in sorted({a for a, _, _ in pairs} | {b for _, b, _ in pairs})),
        proposed=tuple(names[row] for row in matched),
        detail=f"{len(matched)} of {sizes[side]} images of patient {people[side]} have a double among the {sizes[1 - side]} of patient "
        f"{people[1 - side]}; correlation up to {strongest[2]:.4f}{merge}",
        rows=(strongest[0], strongest[1]),
    )
