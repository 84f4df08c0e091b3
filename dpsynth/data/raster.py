"""Folders of PNG or JPEG files with a table.csv."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image as Pillow
from PIL import PngImagePlugin

from dpsynth.artifacts import write_bytes
from dpsynth.data.candidates import to_8_bit
from dpsynth.data.cohort import Cohort, Float32, Image, Record
from dpsynth.data.table import read_table
from dpsynth.data.validate import label_index, with_others
from dpsynth.errors import DataError
from dpsynth.privacy.unit import PrivacyUnit

SUFFIXES = (".png", ".jpg", ".jpeg")
_GREY_TOLERANCE = 32  # of 255 between the colours of a pixel: JPEG leaves some in grey pictures
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "F")


def read_raster(
    folder: Path, *, name: str, unit: PrivacyUnit, classes: tuple[str, ...], label_column: str, channels: int, any_label: bool = False
) -> Cohort:
    """Patients and labels from table.csv; pixels are decoded later. any_label: others than `classes` come behind them. Raises DataError."""
    rows = read_table(folder, label_column=label_column, suffixes=SUFFIXES, any_label=any_label)
    classes = with_others(classes, (row.label for row in rows)) if any_label else classes
    records = tuple(
        Record(
            patient_id=row.patient_id if unit is PrivacyUnit.PATIENT else row.file,
            name=row.file,
            label=label_index(row.label, classes, where=row.file),
            attributes=row.attributes,
            read=partial(read_image, folder / row.file, channels=channels),
        )
        for row in rows
    )
    return Cohort(name=name, unit=unit, classes=classes, records=records)


def read_image(path: Path, *, channels: int) -> Image:
    """Decode a PNG or JPEG to (channels, height, width), values as stored: 0..255, or 0..65535 for deep grey.

    Raises DataError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Pillow.DecompressionBombWarning)
            with Pillow.open(path, formats=("PNG", "JPEG")) as picture:
                picture.load()
                pixels = _pixels(picture, channels)
    except DataError as error:
        raise DataError(f"{path.name}: {error}. Set data.channels: 3, or leave it out.") from error
    except Exception as error:  # pillow raises many kinds for broken files
        raise DataError(
            f"{path.name}: expected a readable PNG or JPEG, found a damaged or other file ({type(error).__name__}). Replace it."
        ) from error
    return Image(voxels=np.ascontiguousarray(pixels, dtype=np.float32))


def _pixels(picture: Pillow.Image, channels: int) -> Float32:
    if picture.mode in _DEEP_MODES:
        grey = np.asarray(picture, dtype=np.float32)
        return np.repeat(grey[None], channels, axis=0)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        background = Pillow.new("RGBA", picture.size, (0, 0, 0, 255))
        picture = Pillow.alpha_composite(background, picture)
    if channels == 1:
        if np.ptp(np.asarray(picture.convert("RGB"), dtype=np.int16), axis=-1).max() > _GREY_TOLERANCE:
            raise DataError("expected a grey image as in data.channels, found 3 channels of colour")
        return np.asarray(picture.convert("L"), dtype=np.float32)[None]
    return np.moveaxis(np.asarray(picture.convert("RGB"), dtype=np.float32), -1, 0)


def write_png(path: Path, image: Float32, *, text: Mapping[str, str]) -> None:
    """Write one image (channel, height, width) in [-1, 1] as 8-bit PNG with text chunks that mark it."""
    picture = _picture(image)
    marks = PngImagePlugin.PngInfo()
    for key, value in text.items():
        marks.add_itxt(key, value)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=marks)
    write_bytes(path, buffer.getvalue())


def is_png_of(path: Path, image: Float32, *, text: Mapping[str, str]) -> bool:
    """Whether a file shows what `write_png` writes, and says it; compressed in whatever way."""
    expected = _picture(image)
    with Pillow.open(path, formats=("PNG",)) as picture:
        picture.load()
        return (
            picture.mode == expected.mode
            and np.array_equal(np.asarray(picture), np.asarray(expected))
            and getattr(picture, "text", {}) == dict(text)
        )


def _picture(image: Float32) -> Pillow.Image:
    pixels = to_8_bit(image)
    return Pillow.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1))
