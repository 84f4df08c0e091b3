"""What a person is asked to look at, as one HTML page: it shows patients and names them, so it stays at the site, and no release has a
place for it.

A flag that can only be accepted blindly is no decision: the page holds every image that a flag is about, what the flag asks, and how the
answer is given.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpsynth.checks.copying import SCREENED_BELOW
from dpsynth.checks.evidence import Evidence
from dpsynth.checks.screening import Decision, Screening, most_like_earlier
from dpsynth.checks.search import approaches
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.data.candidates import to_8_bit
from dpsynth.data.cohort import ImageSet, Int64
from dpsynth.pages import pictures, templates
from dpsynth.progress import silent

MOST_SHOWN = 60  # images of a section; the files beside the page list all of them
_NOTHING_TO_SEE = "There is no image to look at: the question is about many patients at once. "
# check: what the person is asked, what accepting states, what to do after refusing
_ASKED = {
    "copying": (
        "Is any of the pairs below the same person: the same anatomy in the same place, the same device, the same lesion, also if it is "
        "mirrored, shifted or turned?",
        "You state that what each pair has in common is common to many people.",
        "One copy refuses the whole release: to leave single images out because they resemble a patient would depend on patients outside "
        "of epsilon. Train again with a smaller epsilon or a larger cohort. A copy of a control patient means that the control set was "
        "trained on: find out how before anything else.",
    ),
    "content": (
        "May each of the images below be released, whatever ground named it?",
        "You state that they are fit to be released with the others.",
        "The limits of gate.content are fixed for this run: choose stricter ones, or train for longer, in a new run.",
    ),
    "groups": (
        _NOTHING_TO_SEE
        + "Patients of the group that is named can be found more easily than chance allows. Is what epsilon promises to each "
        "of them enough?",
        "You state that the bound by epsilon alone protects this group, and that it is enough.",
        "Train again with a smaller epsilon, or with more patients of that group.",
    ),
    "attributes": (
        _NOTHING_TO_SEE + "The images help to guess the attribute that is named of those who were trained on. Is what epsilon promises to "
        "each of them enough?",
        "You state that the bound by epsilon alone protects this attribute, and that it is enough.",
        "Train again with a smaller epsilon, or without the attribute.",
    ),
    "fairness": (
        _NOTHING_TO_SEE + "The images serve the group that is named worse than the policy asks, or hardly show it. Will those who use them "
        "know, and do no harm to it?",
        "You state that the images may leave all the same; write for what they must not be used.",
        "Draw with more of the group (--target of `dpsynth generate`, which needs another attempt at the gate), or train again.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How a person answers: the command up to its option --accept, what becomes of the words, and the command that refuses."""

    command: str
    words: str
    refusing: str


def review_page(
    evidence: Evidence, verdicts: Sequence[Verdict], *, required: Collection[str], answering: Answering, images_sha256: str
) -> str:
    """The page for verdicts on this evidence; `required`: the checks that must pass; images_sha256: of the candidates.

    Images are numbered as the candidates are, from 0.
    """
    by_name = {verdict.check: verdict for verdict in verdicts}
    flagged = [_question(verdict) for verdict in verdicts if verdict.outcome is Outcome.FLAG]
    screening = evidence.screening
    return (
        templates("dpsynth.checks")
        .get_template("review.html.j2")
        .render(
            count=len(evidence.synthetic),
            images_sha256=images_sha256,
            flagged=flagged,
            stopped=[v for v in verdicts if v.check in required and v.outcome in (Outcome.FAIL, Outcome.INCONCLUSIVE)],
            command=" \\\n    ".join([answering.command, *(f"--accept {question['option']}" for question in flagged)]),
            words=answering.words,
            refusing=answering.refusing,
            pairs=_pairs(evidence, by_name["copying"]) if "copying" in by_name else _section([], 0),
            content=_content(evidence, screening) if screening else _section([], 0),
            sample=_sample(evidence, np.flatnonzero(screening.sample)) if screening else _section([], 0),
        )
    )


def _question(verdict: Verdict) -> dict[str, str]:
    asked, accept, refuse = _ASKED[verdict.check]
    option = f"'{verdict.check}=NAME: WHY'"
    return {"check": verdict.check, "reason": verdict.reason, "asked": asked, "accept": accept, "refuse": refuse, "option": option}


def _section(shown: list[dict[str, Any]], count: int) -> dict[str, Any]:
    return {"shown": shown, "count": count, "hidden": count - len(shown)}


def _pairs(evidence: Evidence, copying: Verdict) -> dict[str, Any]:
    """Each synthetic image that the screening listed, closest first, beside the image of the patient whom it resembles."""
    limit = copying.figures.get(SCREENED_BELOW, 0.0)
    sides = {"trained on": evidence.training, "control, never to be trained on": evidence.control}
    owned = {
        patient: (side, images, rows)
        for side, images in sides.items()
        for patient, rows in zip(images.patient_ids, images.rows_of(), strict=True)
    }
    shown = []
    for (image, patient), ratio in list(zip(copying.listed, copying.ratios, strict=True))[:MOST_SHOWN]:
        side, images, rows = owned[patient]
        row = _most_like(evidence, image, images, rows)
        real = {"pictures": pictures(to_8_bit(images.images[row])), "label": images.classes[int(images.labels[row])]}
        shown.append({**_shown(evidence, image), "patient": patient, "side": side, "ratio": ratio, "limit": limit, "real": real})
    return _section(shown, len(copying.listed))


def _most_like(evidence: Evidence, image: int, images: ImageSet, rows: Int64) -> int:
    """Which of the patient's rows the synthetic image lies nearest to, by the search that found the patient."""
    each = np.arange(len(rows), dtype=np.int64)
    return int(rows[approaches(evidence.synthetic[[image]], images.images[rows], each, progress=silent).per_item(1)[1][0]])


def _content(evidence: Evidence, screening: Screening) -> dict[str, Any]:
    """Each image that is for a person, those that the policy rejects first, with its grounds."""
    rejected, reviewed = np.flatnonzero(screening.of(Decision.REJECT)), np.flatnonzero(screening.of(Decision.REVIEW))
    rows = np.concatenate([rejected, reviewed]).tolist()
    shown = []
    for row in rows[:MOST_SHOWN]:
        grounds = [ground for ground in screening.measured if screening.crossed(ground, Decision.REVIEW)[row]]
        twin = most_like_earlier(evidence.synthetic, row) if "similarity" in grounds else None
        shown.append(
            {
                **_shown(evidence, row),
                "rejected": row in rejected,
                "grounds": [_ground(screening, ground, row) for ground in grounds],
                "twin": None if twin is None else _shown(evidence, twin),
            }
        )
    return _section(shown, len(rows))


def _ground(screening: Screening, ground: str, row: int) -> str:
    review, reject, large_is_bad = screening.limits[ground]
    side = "above" if large_is_bad else "below"
    out = f", out {side} {reject:.4g}" if np.isfinite(reject) else ""
    return f"{ground} {screening.measured[ground][row]:.4g}: for a person {side} {review:.4g}{out}"


def _sample(evidence: Evidence, rows: Int64) -> dict[str, Any]:
    return _section([_shown(evidence, row) for row in rows[:MOST_SHOWN].tolist()], len(rows))


def _shown(evidence: Evidence, image: int) -> dict[str, Any]:
    values = [str(column[image]) for column in evidence.synthetic_attributes.values()]
    label = ", ".join([evidence.training.classes[int(evidence.synthetic_labels[image])], *values])
    return {"number": image, "label": label, "pictures": pictures(to_8_bit(evidence.synthetic[image]))}
