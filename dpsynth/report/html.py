"""The report as one HTML page: no script, nothing loaded from elsewhere, printable."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from dpsynth.pages import templates

_SHEET_ROWS, _SHEET_COLUMNS, _LONGEST_SIDE = 4, 12, 64


def render(view: Mapping[str, Any], *, images: NDArray[np.uint8], labels: NDArray[np.int64], classes: Sequence[str]) -> str:
    """The page for a view model of `epsilon_report`, with a curve and a sheet of sample images (synthetic ones only)."""
    environment = templates("dpsynth.report")
    environment.filters["number"] = _number
    environment.filters["percent"] = _percent
    sheet, shown = sample_sheet(images, labels, num_classes=len(classes))
    return environment.get_template("report.html.j2").render(
        view=view,
        curve=Markup(trade_off_svg(view["curve"])),  # noqa: S704 (made by matplotlib from numbers)
        sheet=base64.b64encode(sheet).decode(),
        shown=[classes[label] for label in shown],
    )


def _percent(value: float) -> str:
    return "less than 0.001 %" if 0 < value < 1e-5 else f"{100 * value:.3g} %"


def _number(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return "infinite" if value == "inf" else value
    return f"{value:.4g}"


def trade_off_svg(curve: Sequence[tuple[float, float]]) -> str:
    """Inline SVG of the best attack's true positive rate against its false positive rate; equal curves give equal bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "dpsynth", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(5.2, 4.0))
        axes = figure.add_subplot()
        x, y = [point[0] for point in curve], [point[1] for point in curve]
        axes.fill_between(x, x, y, color="#cfe3f5", label="what this run allows at most")
        axes.plot(x, y, color="#1c5d99")
        axes.plot([0, 1], [0, 1], color="#555555", linestyle="--", label="guessing")
        axes.set(
            xlabel="wrongly accused, of those who were not in the data",
            ylabel="found, of those who were",
            xlim=(0, 1),
            ylim=(0, 1),
        )
        axes.legend(loc="lower right", frameon=False)
        axes.grid(alpha=0.3)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def sample_sheet(images: NDArray[np.uint8], labels: NDArray[np.int64], *, num_classes: int) -> tuple[bytes, list[int]]:
    """PNG of rows of sample images, a class a row, the first ones in order; of volumes the central slice. Returns the rows' labels."""
    rows, shown = [], []
    for label in range(min(num_classes, _SHEET_ROWS)):
        chosen = images[labels == label][:_SHEET_COLUMNS]
        if len(chosen):
            pictures = [_picture(image) for image in chosen]
            pictures += [np.zeros_like(pictures[0])] * (_SHEET_COLUMNS - len(pictures))
            rows.append(np.concatenate(pictures, axis=1))
            shown.append(label)
    sheet = np.concatenate(rows, axis=0) if rows else np.zeros((8, 8), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue(), shown


def _picture(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    plane = image if image.ndim == 3 else image[:, image.shape[1] // 2]
    step = max(1, max(plane.shape[1:]) // _LONGEST_SIDE)
    plane = plane[:, ::step, ::step]
    flat = plane[0] if len(plane) == 1 else np.moveaxis(plane, 0, -1)
    return np.pad(flat, [(1, 1), (1, 1)] + [(0, 0)] * (flat.ndim - 2))
