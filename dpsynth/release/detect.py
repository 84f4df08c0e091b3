"""The verb detect: how probable it is that images are synthetic, by the detector of a release. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsynth.artifacts import read_json
from dpsynth.data.raster import SUFFIXES, read_image
from dpsynth.detector.evaluation import GUESSING, LEFT_OUT, OWN, doubts, figures, unfit
from dpsynth.detector.model import FILE, NO_DETECTOR, Detector
from dpsynth.detector.traces import traces
from dpsynth.errors import ArtifactError, DataError
from dpsynth.release.bundle import MANIFEST
from dpsynth.release.verify import require_signed

_SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Found:
    """names and probabilities of the images, in order, None for those unlike all that the detector knows; how good the detector is."""

    names: tuple[str, ...]
    probabilities: tuple[float | None, ...]
    signed: bool
    evaluation: Mapping[str, Any]

    def lines(self) -> list[str]:
        """What a reader of the probabilities must know."""
        losses = [float(row["log_loss"]) for row in self.evaluation.get(LEFT_OUT, {}).values()]
        known = (
            f"log loss on generators it had not seen: {min(losses):.2f} to {max(losses):.2f}, guessing {GUESSING:.2f}. " if losses else ""
        )
        own = self.evaluation.get(OWN)
        warnings = [text for text in (unfit(self.evaluation), doubts(self.evaluation)) if text]
        unknown, drawn = sum(p is None for p in self.probabilities), sum(p is not None and p > 0.5 for p in self.probabilities)
        return [
            f"{drawn} of {len(self.names)} are rather synthetic, if half of those asked about are.",
            *([f"{unknown} are unlike all images that the detector knows: it has no opinion of them."] if unknown else []),
            *([] if own is None else [f"On the release's own images, which it was not trained on: {figures(own)}."]),
            *(f"Warning: {text}." for text in warnings),
            f"{known}{self.evaluation.get('limits', '')}",
            *([] if self.signed else ["The detector's signature was not examined; name the releasing site's key with --key."]),
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        pairs = zip(self.names, self.probabilities, strict=True)
        images = [{"image": name, "probability_synthetic": probability} for name, probability in pairs]
        return {"images": images, "detector_signature_examined": self.signed, "evaluation": dict(self.evaluation)}


def detect(folder: Path, images: Sequence[Path], *, public_key: Path | None) -> Found:
    """Judge images by the detector in a released folder. Raises ArtifactError, SignatureError, or DataError for images it does not know."""
    if not (folder / FILE).is_file():
        raise ArtifactError(f"Expected {FILE} in the released folder, found none: {_why_none(folder)}.")
    if public_key is not None:
        require_signed(folder, FILE, public_key)
    detector = Detector.from_json(read_json(folder / FILE))
    names: list[str] = []
    probabilities: list[float | None] = []
    for name, pixels in _read(images, detector.shape):
        if pixels.shape[1:] != detector.shape:
            raise DataError(
                f"{name}: expected images of {_size(detector.shape)}, found {_size(pixels.shape[1:])}. Name them as they were released; "
                "resizing wipes out what is looked for."
            )
        rows = traces(pixels)
        judged, known = detector.of_traces(rows), detector.knows(rows)
        names += [name] if len(judged) == 1 else [f"{name}[{index}]" for index in range(len(judged))]
        probabilities += [round(float(p), 6) if own else None for p, own in zip(judged, known, strict=True)]
    found = Found(names=tuple(names), probabilities=tuple(probabilities), signed=public_key is not None, evaluation=detector.evaluation)
    try:
        found.lines()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"The figures in {FILE} cannot be read ({type(error).__name__}). Get the release again.") from error
    return found


def no_detector(folder: Path) -> str:
    """Why a release holds none though it was asked for, by its manifest; empty when it does not say so."""
    found = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    reason = str(found.get(NO_DETECTOR, "")) if isinstance(found, dict) else ""
    return "".join(character for character in reason if character.isprintable())


def _why_none(folder: Path) -> str:
    reason = no_detector(folder)
    return (
        f"it was asked for and none could be made: {reason}"
        if reason
        else "the run did not ask for one (`release.detector`), or none could be made"
    )


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape[1:])) + f" with {shape[0]} channel{'s' if shape[0] > 1 else ''}"


def _read(paths: Sequence[Path], shape: tuple[int, ...]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Name and 8-bit pixels (n, channel, *space) of every file; folders stand for the pictures in them."""
    for path in paths:
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"{path.name}: expected PNG or JPEG files, found none. Name another folder.")
        for file in inside:
            if not file.is_file():
                raise DataError(f"{file.name}: expected a file, found none. Correct the name.")
            if file.suffix.lower() == ".npz":
                yield file.name, _archive(file, shape)
            else:
                yield file.name, _eight_bits(file.name, read_image(file, channels=shape[0]).voxels[None])


def _archive(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """All images of an npz in MedMNIST layout."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            parts = [arrays[f"{split}_images"] for split in _SPLITS if f"{split}_images" in arrays]
    except Exception as error:  # zipfile, its decompressors and numpy raise many kinds for broken files
        raise DataError(f"{path.name}: expected a MedMNIST npz archive, found something unreadable ({type(error).__name__}).") from error
    parts = [part for part in parts if len(part)]
    if not parts:
        raise DataError(f"{path.name}: expected train_images, val_images or test_images, found none with images.")
    images = np.concatenate(parts)
    colour = images.ndim == len(shape) + 1 and shape[0] > 1
    return _eight_bits(path.name, np.moveaxis(images, -1, 1) if colour else images[:, None])


def _eight_bits(name: str, pixels: NDArray[Any]) -> NDArray[np.uint8]:
    if pixels.dtype.kind not in "uif" or not (pixels.min() >= 0 and pixels.max() <= 255):
        raise DataError(f"{name}: expected grey levels of 0 to 255, found others. Name the 8-bit images.")
    return np.asarray(np.rint(pixels), dtype=np.uint8)
