"""Text burned into pixels: names and dates that somebody wrote over an image.

Two readers. `strokes` needs nothing: it looks for thin lines of high contrast that lie close together, as letters do, and cannot read them.
`ocr` reads: RapidOCR (Apache-2.0, models in its package, nothing is downloaded) finds lines and their letters; it takes about a second an
image and is installed with `dpsynth[ocr]`. Neither works on images below `SMALLEST_SIDE` pixels, where no text can be read.
"""

from __future__ import annotations

import logging
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dpsynth.data.candidates import to_8_bit
from dpsynth.errors import UsageError
from dpsynth.progress import Progress

Array = NDArray[np.float64]
Float32 = NDArray[np.float32]
Reader = Literal["strokes", "ocr"]
LIMITS: dict[Reader, float] = {"strokes": 3.5, "ocr": 0.6}  # above which a person must look
SMALLEST_SIDE = 48  # three letters of the smallest legible print, 6 pixels each, with room around them
_CONTRAST = 0.5  # of a stroke against what lies beside it, in units of [-1, 1]
_LETTER = (5, 40)  # pixels of height
_STROKE = 5  # opening that removes lines of up to 4 pixels
_FEWEST_LETTERS, _CONFIDENCE = 3, 0.6
_BLOCK = 256


def text_scores(images: Float32, *, reader: Reader, task: str, progress: Progress) -> Array:
    """How much each image looks as if text were burned in, (n,), of images (n, channel, *space) in [-1, 1]; of a volume its
    slices' largest. Zero for images too small to hold text. Raises UsageError when the reader is not installed.

    strokes: letters that lie on one line. ocr: the reader's own confidence in a line of three letters or more.
    """
    if min(images.shape[-2:]) < SMALLEST_SIDE:
        return np.zeros(len(images))
    return _stroke_scores(images, task, progress) if reader == "strokes" else _ocr_scores(images, task, progress)


def readable(shape: tuple[int, ...]) -> bool:
    """Whether images of this shape (channel, *space) are large enough to hold text."""
    return min(shape[-2:]) >= SMALLEST_SIDE


def _stroke_scores(images: Float32, task: str, progress: Progress) -> Array:
    scores = np.empty(len(images))
    for index, image in enumerate(images):
        planes = image.mean(axis=0).reshape(-1, *image.shape[-2:])
        scores[index] = max(letters_on_a_line(plane) for plane in planes)
        if index % _BLOCK == _BLOCK - 1 or index + 1 == len(images):
            progress(f"text in {task}", index + 1, len(images))
    return scores


def letters_on_a_line(plane: Float32) -> float:
    """Most letters that lie on one line of a picture (height, width) in [-1, 1], bright or dark.

    Letters are pieces of stroke, thinner than `_STROKE` pixels and of `_CONTRAST` against their surroundings, of like height and level;
    letters that touch count by their width.
    """
    opened = plane - ndimage.grey_opening(plane, size=(_STROKE, _STROKE), mode="nearest")
    closed = ndimage.grey_closing(plane, size=(_STROKE, _STROKE), mode="nearest") - plane
    return max(_most_on_a_line(strokes > _CONTRAST) for strokes in (opened, closed))


def _most_on_a_line(strokes: NDArray[np.bool_]) -> float:
    pieces, count = ndimage.label(strokes, structure=np.ones((3, 3)))
    if not count:
        return 0.0
    boxes = np.array([[s.start, s.stop, t.start, t.stop] for s, t in ndimage.find_objects(pieces)], dtype=np.float64)
    area = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
    height, width = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    filled = area / (height * width)
    like = (height >= _LETTER[0]) & (height <= _LETTER[1]) & (width <= 8 * height) & (filled > 0.2) & (filled < 0.9)
    boxes, height, width = boxes[like], height[like], width[like]
    if not like.any():
        return 0.0
    letters = np.maximum(1, np.rint(width / (0.8 * height)))
    middle_y, middle_x = (boxes[:, 0] + boxes[:, 1]) / 2, (boxes[:, 2] + boxes[:, 3]) / 2
    level = np.abs(middle_y[:, None] - middle_y) < 0.3 * height
    alike = np.abs(height[:, None] - height) <= 0.35 * height
    near = np.abs(middle_x[:, None] - middle_x) < 8 * height
    return float(((level & alike & near) * letters[:, None]).sum(axis=0).max())


def _ocr_scores(images: Float32, task: str, progress: Progress) -> Array:
    try:
        from rapidocr import RapidOCR
    except ModuleNotFoundError as error:
        raise UsageError(
            "gate.content.text: ocr needs RapidOCR, which is not installed. Run: pip install 'dpsynth[ocr]', or set strokes."
        ) from error
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)  # it warns of every image without text
    engine = RapidOCR(params={"Global.log_level": "error"})
    scores = np.zeros(len(images))
    for index, image in enumerate(images):
        planes = image.mean(axis=0)
        pixels = to_8_bit(planes)
        for plane in pixels.reshape(-1, *pixels.shape[-2:]):
            found = engine(np.repeat(plane[..., None], 3, axis=2))
            for text, score in zip(found.txts or (), found.scores or (), strict=True):
                letters = sum(character.isalnum() for character in cast(str, text))
                if letters >= _FEWEST_LETTERS and score >= _CONFIDENCE:
                    scores[index] = max(scores[index], float(score))
        progress(f"text in {task}", index + 1, len(images))
    return scores
