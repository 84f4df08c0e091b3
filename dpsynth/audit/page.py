"""The audit as one HTML page with pictures of patients: no script, nothing loaded from elsewhere, for the data owner alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpsynth.audit.finding import Finding, Kind
from dpsynth.data.candidates import to_8_bit
from dpsynth.data.cohort import Float32
from dpsynth.pages import pictures, templates

MOST_SHOWN = 40  # findings of a kind; all are in the JSON and in the proposed list


def render(view: Mapping[str, Any], findings: Sequence[Finding], images: Float32, *, name: str) -> str:
    """The page for `Audit.to_json`, with the pictures (n, channel, *space) in [-1, 1] that the findings point at."""
    kinds, unseen = [], view["not_looked_for"]
    for kind in Kind:
        of_kind = [finding for finding in findings if finding.kind is kind]
        shown = [
            {
                "images": finding.images,
                "detail": finding.detail,
                "pictures": [uri for row in finding.rows for uri in pictures(to_8_bit(images[row]))],
            }
            for finding in of_kind[:MOST_SHOWN]
        ]
        reason = unseen.get(kind.name.lower(), "")
        kinds.append({"title": kind.value, "count": len(of_kind), "compares": kind.compares_patients, "shown": shown, "unseen": reason})
    return templates("dpsynth.audit").get_template("audit.html.j2").render(view=view, kinds=kinds, name=name)
