"""The audit as one HTML page with pictures of patients: no script, nothing loaded from elsewhere, for the data owner alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from dpsynth.audit.finding import Finding, Kind
from dpsynth.data.candidates import to_8_bit
from dpsynth.data.cohort import Float32

MOST_SHOWN = 40  # findings of a kind; all are in the JSON and in the proposed list
_SMALLEST_SIDE = 96


def render(view: Mapping[str, Any], findings: Sequence[Finding], images: Float32, *, name: str) -> str:
    """The page for `Audit.to_json`, with the pictures (n, channel, *space) in [-1, 1] that the findings point at."""
    environment = Environment(
        loader=PackageLoader("dpsynth.audit", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    kinds, unseen = [], view["not_looked_for"]
    for kind in Kind:
        of_kind = [finding for finding in findings if finding.kind is kind]
        shown = [
            {"images": f.images, "detail": f.detail, "pictures": [picture(images[row]) for row in f.rows]} for f in of_kind[:MOST_SHOWN]
        ]
        reason = unseen.get(kind.name.lower(), "")
        kinds.append({"title": kind.value, "count": len(of_kind), "compares": kind.compares_patients, "shown": shown, "unseen": reason})
    return environment.get_template("audit.html.j2").render(view=view, kinds=kinds, name=name)


def picture(image: Float32) -> str:
    """Base64 PNG of an image, of a volume its central slice, enlarged so that it can be seen."""
    plane = to_8_bit(image if image.ndim == 3 else image[:, image.shape[1] // 2])
    factor = max(1, -(-_SMALLEST_SIDE // min(plane.shape[1:])))
    grown: NDArray[np.uint8] = plane.repeat(factor, axis=1).repeat(factor, axis=2)
    buffer = io.BytesIO()
    Image.fromarray(grown[0] if len(grown) == 1 else np.moveaxis(grown, 0, -1)).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
