"""What the HTML pages share: templates that escape what they are given, and pictures inside the page. No page runs or loads anything."""

from __future__ import annotations

import base64
import io

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def templates(package: str) -> Environment:
    """The templates of a package; whatever a patient's id or a file's name holds is text there, never markup."""
    return Environment(
        loader=PackageLoader(package, "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def pictures(image: Pixels) -> list[str]:
    """Data URIs of an image (channel, *space), a pixel a pixel: the page enlarges it. Of a volume its three central slices."""
    planes = [image] if image.ndim == 3 else [image.take(image.shape[axis] // 2, axis=axis) for axis in (1, 2, 3)]
    return ["data:image/png;base64," + base64.b64encode(png(plane)).decode() for plane in planes]


def png(plane: Pixels) -> bytes:
    """PNG of (1 or 3, height, width)."""
    buffer = io.BytesIO()
    Image.fromarray(plane[0] if len(plane) == 1 else np.moveaxis(plane, 0, -1)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
