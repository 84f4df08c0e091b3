"""MedMNIST archives: one npz with {split}_images and {split}_labels, no patient ids, so the unit is the image."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpsynth.artifacts import write_bytes
from dpsynth.data.cohort import Cohort, Image, Record
from dpsynth.errors import DataError
from dpsynth.privacy.unit import PrivacyUnit


def read_medmnist(path: Path, *, name: str, split: str, classes: tuple[str, ...], dimensions: int, any_label: bool = False) -> Cohort:
    """Each image is a privacy unit of its own.

    any_label: numbers without a name come behind `classes`. Raises DataError for anything that is not such an archive.
    """
    images, labels = _arrays(path, split)
    if images.dtype.kind not in "uif":
        raise DataError(f"{path.name}: expected numbers in {split}_images, found dtype {images.dtype}.")
    colour = images.ndim == dimensions + 2 and images.shape[-1] == 3
    if images.ndim != dimensions + 1 and not colour:
        raise DataError(f"{path.name}: expected {split}_images of {dimensions} spatial dimensions, found shape {images.shape}.")
    if labels.shape not in ((len(images),), (len(images), 1)) or labels.dtype.kind not in "ui":
        raise DataError(
            f"{path.name}: expected one whole-number label per image in {split}_labels, found shape {labels.shape}, dtype {labels.dtype}."
        )
    flat = labels.reshape(len(images)).astype(np.int64)
    unknown = (flat < 0) | (flat >= len(classes))
    if unknown.any() and not any_label:
        raise DataError(f"{path.name}: label {int(flat[unknown][0])} has no name; data.classes lists {len(classes)}.")
    others, places = np.unique(flat[unknown], return_inverse=True)
    flat[unknown] = len(classes) + places
    records = tuple(
        Record(
            patient_id=f"image-{index}",
            name=f"{path.name}[{index}]",
            label=int(label),
            attributes={},
            read=partial(_image, images[index], colour=colour),
        )
        for index, label in enumerate(flat)
    )
    return Cohort(name=name, unit=PrivacyUnit.IMAGE, classes=(*classes, *map(str, others.tolist())), records=records)


def _arrays(path: Path, split: str) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if f"{split}_images" not in archive or f"{split}_labels" not in archive:
                raise DataError(f"{path.name}: expected the arrays {split}_images and {split}_labels, found {sorted(archive)[:6]}.")
            return archive[f"{split}_images"], archive[f"{split}_labels"]
    except DataError:
        raise
    except Exception as error:  # zipfile, its decompressors and numpy raise many kinds for broken files
        raise DataError(
            f"Expected a MedMNIST npz archive at {path.name}, found something unreadable ({type(error).__name__}). Replace it."
        ) from error


def _image(stored: NDArray[np.generic], *, colour: bool) -> Image:
    voxels = np.asarray(stored, dtype=np.float32)
    return Image(voxels=np.ascontiguousarray(np.moveaxis(voxels, -1, 0)) if colour else voxels[None])


def stored_layout(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images (n, channel, *space) as an archive holds them: channels last, and none when there is one."""
    return images[:, 0] if images.shape[1] == 1 else np.moveaxis(images, 1, -1)


def archive_arrays(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
    """Images (n, channel, *space) in MedMNIST layout by the names of their arrays: train_* filled, val_* and test_* empty."""
    channels_last = stored_layout(images)
    column = labels.astype(np.uint8).reshape(-1, 1)
    arrays: dict[str, NDArray[np.generic]] = {"train_images": channels_last, "train_labels": column}
    for split in ("val", "test"):
        arrays |= {f"{split}_images": channels_last[:0], f"{split}_labels": column[:0]}
    return arrays


def write_npz(path: Path, *, images: NDArray[np.uint8], labels: NDArray[np.int64], extra: Mapping[str, NDArray[np.generic]]) -> None:
    """Write `archive_arrays` and `extra`; equal input gives equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in {**archive_arrays(images, labels), **extra}.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, content.getvalue(), zipfile.ZIP_DEFLATED)
    write_bytes(path, buffer.getvalue())
