"""Candidates looked at one by one before anything else: blank, saturated, doubled, implausible, or written on.

Every ground is computed from the candidates themselves, from released moments and from public settings. No private image is read, so
leaving single images out on these grounds is post-processing and costs no privacy; a ground that looked at patients would not be.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsynth.cells import Cells
from dpsynth.checks.burned_text import LIMITS, readable, text_scores
from dpsynth.checks.plausibility import Reference, deviations
from dpsynth.checks.statistics import pairwise
from dpsynth.config import ContentConfig
from dpsynth.data.candidates import Candidates, to_unit_range
from dpsynth.data.cohort import Float32, Int64
from dpsynth.model.moments import Moments
from dpsynth.model.thumbnails import thumbnails
from dpsynth.progress import Progress

Array = NDArray[np.float64]
_ENDS = 2 / 127.5  # of [-1, 1]: two of 256 grey levels
_BLOCK = 512


class Decision(enum.Enum):
    """What becomes of one image; REVIEW is for a person."""

    PASS = "pass"  # noqa: S105
    REVIEW = "review"
    REJECT = "reject"


@dataclass(frozen=True, kw_only=True)
class Screening:
    """The grounds by name, each (n,), with the limits that they were held against; which images a person is shown besides."""

    measured: Mapping[str, Array]
    limits: Mapping[str, tuple[float, float, bool]]  # review, reject; True: large is bad
    sample: NDArray[np.bool_]
    text_was_read: bool

    def __len__(self) -> int:
        return len(self.sample)

    def crossed(self, ground: str, decision: Decision) -> NDArray[np.bool_]:
        """Images that a ground alone sends to a person, or out."""
        review, reject, large_is_bad = self.limits[ground]
        limit, values = review if decision is Decision.REVIEW else reject, self.measured[ground]
        return values > limit if large_is_bad else values < limit

    def of(self, decision: Decision) -> NDArray[np.bool_]:
        """Images whose worst ground gives this decision, (n,)."""
        rejected, reviewed = np.zeros(len(self), dtype=np.bool_), np.zeros(len(self), dtype=np.bool_)
        for ground in self.measured:
            rejected |= self.crossed(ground, Decision.REJECT)
            reviewed |= self.crossed(ground, Decision.REVIEW)
        if decision is Decision.REJECT:
            return rejected
        return reviewed & ~rejected if decision is Decision.REVIEW else ~reviewed & ~rejected

    def counts(self, decision: Decision) -> dict[str, int]:
        """By ground the images that it alone gives this decision; nothing where there are none."""
        found = {ground: int(self.crossed(ground, decision).sum()) for ground in self.measured}
        return {ground: number for ground, number in found.items() if number}

    def log(self, seeds: NDArray[np.uint64]) -> list[dict[str, Any]]:
        """Every decision with its grounds, a row an image."""
        outcome = {decision: self.of(decision) for decision in Decision}
        rows = []
        for index, seed in enumerate(seeds.tolist()):
            decision = next(decision for decision, rows_of in outcome.items() if rows_of[index])
            grounds = [g for g in self.measured if decision is not Decision.PASS and self.crossed(g, decision)[index]]
            figures = {ground: round(float(values[index]), 5) for ground, values in self.measured.items()}
            rows.append(
                {
                    "index": index,
                    "seed": seed,
                    "decision": decision.value,
                    "grounds": grounds,
                    "sample": bool(self.sample[index]),
                    **figures,
                }
            )
        return rows


def screen_candidates(
    candidates: Candidates, layout: Cells, moments: Moments, policy: ContentConfig, *, sample_key: bytes, progress: Progress
) -> Screening:
    """Candidates against the released moments that they were drawn from. The key, which stays at the site, chooses the sample."""
    cells = layout.index(candidates.labels, candidates.conditions())
    return screen(to_unit_range(candidates.images), cells, Reference.of(moments), policy, sample_key=sample_key, progress=progress)


def screen(
    images: Float32, cells: Int64, reference: Reference, policy: ContentConfig, *, sample_key: bytes, progress: Progress
) -> Screening:
    """Measure every candidate (n, channel, *space) in [-1, 1], drawn from `cells` (n,). The sample depends on key and images alone."""
    flat = images.reshape(len(images), -1)
    structure, detail = deviations(images, cells, reference)
    measured = {
        "contrast": flat.std(axis=1, dtype=np.float64),  # not percentiles: a mask may fill a hundredth of a volume
        "saturated": (flat >= 1 - _ENDS).mean(axis=1, dtype=np.float64),  # not the dark end: background is dark in most images
        "similarity": similarity_to_earlier(images, progress=progress),
        "structure": structure,
        "detail": detail,
        "text": text_scores(images, reader=policy.text, task="synthetic images", progress=progress),
    }
    limit = LIMITS[policy.text]
    limits = {
        "contrast": (*policy.contrast, False),
        "saturated": (*policy.saturated, True),
        "similarity": (*policy.similarity, True),
        "structure": (*policy.structure, True),
        "detail": (*policy.detail, True),
        "text": (limit, np.inf, True),
    }
    sample = keyed_sample(images, policy.person_sees, key=sample_key)
    return Screening(measured=measured, limits=limits, sample=sample, text_was_read=readable(images.shape[1:]))


def similarity_to_earlier(images: Float32, *, progress: Progress) -> Array:
    """Largest correlation with the thumbnail of an earlier image, (n,); the first has -1. The first of several doubles is thus kept."""
    rows = thumbnails(images)
    found = np.full(len(rows), -1.0)
    for start in range(0, len(rows), _BLOCK):
        block = 1 - pairwise(rows[start : start + _BLOCK], rows[: start + _BLOCK]) ** 2 / 2
        later = np.arange(block.shape[1])[None] >= (start + np.arange(len(block)))[:, None]
        block[later] = -1
        found[start : start + len(block)] = block.max(axis=1)
        progress("compare candidates", min(start + _BLOCK, len(rows)), len(rows))
    return found


def most_like_earlier(images: Float32, row: int) -> int:
    """Number of the earlier image whose correlation `similarity_to_earlier` gives for this one; not for the first."""
    return int(pairwise(thumbnails(images[[row]]), thumbnails(images[:row]))[0].argmin())


def keyed_sample(images: Float32, wanted: int, *, key: bytes) -> NDArray[np.bool_]:
    """Which images a person is shown in any case, (n,): nobody without the key can foresee it, everybody with it repeats it."""
    content = hashlib.sha256(np.ascontiguousarray(images).tobytes()).digest()
    ranks = [
        hmac.new(key, b"content sample\0" + content + index.to_bytes(8, "big"), hashlib.sha256).digest() for index in range(len(images))
    ]
    chosen = np.zeros(len(images), dtype=bool)
    chosen[sorted(range(len(images)), key=ranks.__getitem__)[:wanted]] = True
    return chosen
