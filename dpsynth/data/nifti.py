"""Folders of NIfTI files with a table.csv, and marked synthetic NIfTI files."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from dpsynth.artifacts import write_bytes
from dpsynth.data.candidates import to_8_bit
from dpsynth.data.cohort import Cohort, Float32, Image, Record
from dpsynth.data.orientation import oriented
from dpsynth.data.table import read_table
from dpsynth.data.validate import label_index, with_others
from dpsynth.errors import DataError
from dpsynth.privacy.unit import PrivacyUnit

SUFFIXES = (".nii", ".nii.gz")
_COMMENT = 6  # code of a header extension with plain text
_RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


def read_nifti(
    folder: Path, *, name: str, unit: PrivacyUnit, classes: tuple[str, ...], label_column: str, any_label: bool = False
) -> Cohort:
    """Patients and labels from table.csv; voxels are decoded later. any_label: others than `classes` come behind them. Raises DataError."""
    rows = read_table(folder, label_column=label_column, suffixes=SUFFIXES, any_label=any_label)
    classes = with_others(classes, (row.label for row in rows)) if any_label else classes
    records = tuple(
        Record(
            patient_id=row.patient_id if unit is PrivacyUnit.PATIENT else row.file,
            name=row.file,
            label=label_index(row.label, classes, where=row.file),
            attributes=row.attributes,
            read=partial(read_volume, folder / row.file),
        )
        for row in rows
    )
    return Cohort(name=name, unit=unit, classes=classes, records=records)


def read_volume(path: Path) -> Image:
    """Decode one file to (channel, right, anterior, superior) in its scaled intensities.

    A file of one slice becomes a picture (channel, row, column) as a radiologist sees it: anterior on top, the patient's right
    on the left. Raises DataError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, about voxels that do not fit; what matters is checked on the values
            file: Any = nibabel.load(path)
            if not isinstance(file, nibabel.Nifti1Image | nibabel.Nifti1Pair):
                raise DataError(f"{path.name}: expected NIfTI, found {type(file).__name__}. Convert it.")
            voxels = _channels_first(np.asanyarray(file.dataobj), path.name)
            image = oriented(voxels, file.affine)
    except DataError:
        raise
    except Exception as error:  # nibabel, gzip and numpy raise many kinds for broken files
        raise DataError(
            f"{path.name}: expected a readable NIfTI file, found a damaged or foreign one ({type(error).__name__}). Replace it."
        ) from error
    if image.voxels.shape[-1] > 1:
        return image
    spacing = image.spacing_mm or (1.0, 1.0, 1.0)
    picture = np.swapaxes(image.voxels[:, ::-1, ::-1, 0], 1, 2)
    return Image(voxels=np.ascontiguousarray(picture), spacing_mm=(spacing[1], spacing[0]))


def _channels_first(stored: NDArray[Any], name: str) -> Float32:
    if stored.dtype.names is not None:
        if stored.dtype.names[:3] != ("R", "G", "B"):
            raise DataError(f"{name}: expected numbers or RGB as voxels, found {stored.dtype}. Convert it.")
        stored = np.stack([stored[channel] for channel in "RGB"])
    else:
        stored = stored[None]
    if stored.dtype.kind not in "uif":
        raise DataError(f"{name}: expected real numbers as voxels, found {stored.dtype}. Convert it to magnitude.")
    while stored.ndim > 4 and stored.shape[-1] == 1:
        stored = stored[..., 0]
    if stored.ndim == 3:
        stored = stored[..., None]
    if stored.ndim != 4 or 0 in stored.shape:
        raise DataError(f"{name}: expected one volume of 3 dimensions, found shape {stored.shape[1:]}. Split series into volumes.")
    return np.asarray(stored, dtype=np.float32)


def write_nifti(path: Path, image: Float32, *, spacing_mm: tuple[float, ...] | None, marking: Mapping[str, object]) -> None:
    """Write one synthetic image (channel, *space) in [-1, 1] as 8-bit NIfTI, marked; equal input gives equal bytes.

    The marking is JSON in a header extension of code 6, beside "synthetic": true; the header says it in words. A volume's axes
    are taken as right, anterior, superior; a picture's as in `read_volume`. `path` ends in .nii or .nii.gz.
    Raises StorageError.
    """
    raw = _content(image, spacing_mm, marking)
    write_bytes(path, gzip.compress(raw, mtime=0) if path.name.endswith(".gz") else raw)


def is_nifti_of(path: Path, image: Float32, *, spacing_mm: tuple[float, ...] | None, marking: Mapping[str, object]) -> bool:
    """Whether a .nii.gz file is what `write_nifti` writes, compressed in whatever way."""
    return gzip.decompress(path.read_bytes()) == _content(image, spacing_mm, marking)


def _content(image: Float32, spacing_mm: tuple[float, ...] | None, marking: Mapping[str, object]) -> bytes:
    pixels = to_8_bit(image)
    spacing = spacing_mm or (1.0,) * (image.ndim - 1)
    if image.ndim == 3:
        pixels = np.swapaxes(pixels, 1, 2)[:, ::-1, ::-1, None]
        spacing = (spacing[1], spacing[0], 1.0)
    if len(pixels) == 3:
        voxels: NDArray[Any] = np.empty(pixels.shape[1:], dtype=_RGB)
        for channel, values in zip("RGB", pixels, strict=True):
            voxels[channel] = values
    else:
        voxels = np.ascontiguousarray(pixels[0])
    file = nibabel.Nifti1Image(voxels, np.diag((*spacing, 1.0)))
    content = json.dumps({"synthetic": True, **marking}, sort_keys=True).encode()
    file.header.extensions.append(nibabel.nifti1.Nifti1Extension(_COMMENT, content))
    file.header["descrip"] = b"SYNTHETIC AI-GENERATED, not for diagnostic use"
    file.header["intent_name"] = b"synthetic"
    file.header["aux_file"] = b"SYNTHETIC"
    file.header.set_xyzt_units("mm")
    raw: bytes = file.to_bytes()
    return raw


def read_marking(path: Path) -> dict[str, Any] | None:
    """The marking that `write_nifti` left, None when the file has none. Raises DataError for an unreadable file."""
    try:
        file: Any = nibabel.load(path)
        for extension in file.header.extensions:
            if extension.get_code() == _COMMENT:
                record = json.loads(bytes(extension.get_content()).rstrip(b"\0"))
                if isinstance(record, dict) and record.get("synthetic"):
                    return record
    except Exception as error:  # as in read_volume
        raise DataError(f"{path.name}: expected a readable NIfTI file, found a damaged one. Replace it.") from error
    return None
