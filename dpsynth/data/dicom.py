"""Folders of DICOM files: patients from PatientID, labels from the header or from a table.csv.

Which label counts: when the folder holds a table.csv, its labels (by column `file`, else by `patient_id`) and nothing from
the headers; without a table, the attribute whose DICOM keyword is data.label_column. A table with `file` and `patient_id`
also names the patients, for exports whose PatientID was wiped. So for data.attributes: a column of the table counts, else the keyword.
"""

from __future__ import annotations

import csv
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.datadict import tag_for_keyword
from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

from dpsynth.data.cohort import Cohort, Float32, Image, Record
from dpsynth.data.orientation import oriented
from dpsynth.data.table import NAME as TABLE
from dpsynth.data.validate import label_index, with_others
from dpsynth.errors import DataError
from dpsynth.privacy.unit import PrivacyUnit

_AGE_UNITS = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}


@dataclass(frozen=True, kw_only=True)
class _Header:
    path: Path
    file: str  # relative to the folder
    patient_id: str
    label: str
    series: str
    instance: str
    frames: int
    attributes: Mapping[str, str]
    conditions: tuple[str, ...]  # the values of the declared attributes


def read_dicom(
    folder: Path,
    *,
    name: str,
    unit: PrivacyUnit,
    classes: tuple[str, ...],
    label_column: str,
    dimensions: int,
    attribute_columns: tuple[str, ...] = (),
    any_label: bool = False,
) -> Cohort:
    """Every DICOM file below `folder`. With 2 `dimensions` each file is an image, with 3 each series is a volume.

    any_label: other labels than `classes` come behind them, and none is the empty one.
    `attribute_columns` are read beside sex, age_years and site: columns of the table, else DICOM keywords.
    A copy of an image (equal SOPInstanceUID, patient, label and pixels) is left out. Raises DataError for a file that is no
    DICOM, or has no patient, no label, an unknown label, or the SOPInstanceUID of something else.
    """
    if not folder.is_dir():
        raise DataError(f"Expected a folder at {folder.name}, found none. Check data.path.")
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (TABLE, "DICOMDIR") and not p.name.startswith("."))
    table = _Labels(folder / TABLE, label_column, attribute_columns, any_label=any_label) if (folder / TABLE).exists() else None
    headers = [
        _header(path, folder, table=table, label_column=label_column, attribute_columns=attribute_columns, any_label=any_label)
        for path in paths
    ]
    if table is not None:
        table.require_used()
    distinct = _distinct(headers)
    classes = with_others(classes, (header.label for header in distinct)) if any_label else classes
    groups = [[header] for header in distinct] if dimensions == 2 else _series(distinct)
    records = []
    for group in groups:
        first = group[0]
        read = partial(read_picture, first.path) if dimensions == 2 else partial(read_series, tuple(h.path for h in group))
        records.append(
            Record(
                patient_id=first.patient_id if unit is PrivacyUnit.PATIENT else first.file,
                name=first.file,
                label=label_index(first.label, classes, where=first.file),
                attributes=first.attributes,
                read=read,
            )
        )
    return Cohort(name=name, unit=unit, classes=classes, records=tuple(records))


class _Labels:
    """The table.csv of a DICOM folder: labels by file or by patient."""

    def __init__(self, path: Path, label_column: str, attribute_columns: tuple[str, ...], *, any_label: bool) -> None:
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, strict=True)
                columns = set(reader.fieldnames or ())
                rows = list(reader)
        except (csv.Error, UnicodeDecodeError, OSError) as error:
            raise DataError(f"{TABLE}: expected a readable CSV file in UTF-8. Export it again.") from error
        self._key = "file" if "file" in columns else "patient_id"
        if self._key not in columns or label_column not in columns:
            raise DataError(f"{TABLE}: expected the columns file or patient_id, and {label_column}. Add them or remove the table.")
        self._rows: dict[str, tuple[str, str]] = {}
        self._attributes: dict[str, dict[str, str]] = {}
        self._used: set[str] = set()
        for number, row in enumerate(rows, 2):
            key, label = (row[self._key] or "").strip(), (row[label_column] or "").strip()
            if not key or not (label or any_label):
                raise DataError(f"{TABLE} line {number}: {self._key} or {label_column} is empty. Complete the row.")
            if key in self._rows:
                raise DataError(f"{TABLE} line {number}: {key} appears twice. Keep one row for each {self._key}.")
            patient = (row.get("patient_id") or "").strip() if self._key == "file" else ""
            self._rows[key] = (label, patient)
            self._attributes[key] = {column: (row[column] or "").strip() for column in attribute_columns if column in columns}

    def of(self, *, file: str, patient_id: str) -> tuple[str, str]:
        """Label and patient id of a file."""
        key = file if self._key == "file" else patient_id
        if key not in self._rows:
            raise DataError(f"{TABLE}: {file} has no row by its {self._key}. Add one or remove the file.")
        self._used.add(key)
        label, patient = self._rows[key]
        return label, patient or patient_id

    def attributes_of(self, *, file: str, patient_id: str) -> dict[str, str]:
        """Those attributes of a file that have a column, empty where the row has no value."""
        return self._attributes[file if self._key == "file" else patient_id]

    def require_used(self) -> None:
        """Raise DataError when a row belongs to no file."""
        unused = sorted(set(self._rows) - self._used)
        if unused:
            raise DataError(f"{TABLE}: {len(unused)} rows have no DICOM file, the first is {unused[0]}. Correct the table.")


def _open(path: Path, *, pixels: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's, about the spelling of values; those in use are checked here
            return pydicom.dcmread(path, stop_before_pixels=not pixels)
    except Exception as error:  # pydicom raises many kinds for broken files
        raise DataError(f"{path.name}: expected a DICOM file, found {type(error).__name__} on reading. Remove or replace it.") from error


def _value(dataset: Any, keyword: str, name: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = dataset.get(keyword)
            return "" if value is None else str(value).strip(" \0")
    except Exception as error:  # a value that its type forbids fails on access
        raise DataError(f"{name}: {keyword} is not readable. Correct the file or remove it.") from error


def _header(
    path: Path, folder: Path, *, table: _Labels | None, label_column: str, attribute_columns: tuple[str, ...], any_label: bool
) -> _Header:
    file, dataset = path.relative_to(folder).as_posix(), _open(path, pixels=False)
    patient_id = _value(dataset, "PatientID", file)
    attributes = _attributes(dataset, file, attribute_columns)
    if table is not None:
        label, named = table.of(file=file, patient_id=patient_id)
        attributes |= table.attributes_of(file=file, patient_id=patient_id)
        patient_id = named
    else:
        label = _value(dataset, label_column, file)
    if not patient_id:
        raise DataError(f"{file}: PatientID is empty. Restore it, or name the patients in {TABLE} (columns file, patient_id, label).")
    if not (label or any_label):
        raise DataError(f"{file}: no label in {label_column!r}. Set data.label_column to a DICOM keyword, or add {TABLE}.")
    frames = _value(dataset, "NumberOfFrames", file) or "1"
    if not frames.isascii() or not frames.isdigit() or int(frames) < 1:
        raise DataError(f"{file}: expected a whole NumberOfFrames, found {frames!r}. Correct the file or remove it.")
    return _Header(
        path=path,
        file=file,
        patient_id=patient_id,
        label=label,
        series=_value(dataset, "SeriesInstanceUID", file),
        instance=_value(dataset, "SOPInstanceUID", file),
        frames=int(frames),
        attributes={key: value for key, value in attributes.items() if value},
        conditions=tuple(attributes.get(column, "") for column in attribute_columns),
    )


def _attributes(dataset: Any, name: str, columns: tuple[str, ...]) -> dict[str, str]:
    found = {column: _value(dataset, column, name) for column in columns if tag_for_keyword(column) is not None}
    found |= {"sex": _value(dataset, "PatientSex", name), "site": _value(dataset, "InstitutionName", name)}
    age = _value(dataset, "PatientAge", name)
    if len(age) == 4 and age[:3].isascii() and age[:3].isdigit() and age[3] in _AGE_UNITS:
        found["age_years"] = str(int(int(age[:3]) * _AGE_UNITS[age[3]]))
    return found


def _distinct(headers: list[_Header]) -> list[_Header]:
    """Each image once: exports often hold copies, and a copy would count as one more image of its patient."""
    seen: dict[str, _Header] = {}
    for header in headers:
        first = seen.setdefault(header.instance or header.file, header)
        if first is header:
            continue
        pixels = [_open(path, pixels=True).get("PixelData") for path in (first.path, header.path)]
        facts = [(h.patient_id, h.label, h.conditions) for h in (first, header)]
        same = facts[0] == facts[1] and pixels[0] == pixels[1]
        if not same:
            found = "but another patient, label, attribute or picture"
            raise DataError(f"{header.file}: the SOPInstanceUID of {first.file} {found}. Remove or correct one of them.")
    return list(seen.values())


def _series(headers: list[_Header]) -> list[list[_Header]]:
    groups: dict[str, list[_Header]] = defaultdict(list)
    for header in headers:
        if not header.series:
            raise DataError(f"{header.file}: SeriesInstanceUID is empty, so its volume is unknown. Restore it or remove the file.")
        key = header.file if header.frames > 1 else header.series
        groups[key].append(header)
        first = groups[key][0]
        if (header.patient_id, header.label, header.conditions) != (first.patient_id, first.label, first.conditions):
            raise DataError(
                f"{header.file}: another patient or label, or other attributes, than {first.file} of the same series. Correct one of them."
            )
    return list(groups.values())


def read_picture(path: Path) -> Image:
    """Decode one file of one frame to (channel, row, column). Raises DataError."""
    dataset = _open(path, pixels=True)
    frames = _decoded(dataset, path.name)
    if frames.shape[1] != 1:
        raise DataError(f"{path.name}: expected one frame, found {frames.shape[1]}. Use 3 numbers in data.spatial_shape for volumes.")
    spacing = _numbers(dataset, "PixelSpacing", 2)
    return Image(voxels=frames[:, 0], spacing_mm=None if spacing is None else (spacing[0], spacing[1]))


def read_series(paths: tuple[Path, ...]) -> Image:
    """Decode the files of one series to one volume (channel, right, anterior, superior).

    Slices are sorted by ImagePositionPatient along the normal of ImageOrientationPatient and must be evenly spaced. A file of
    several frames stays (channel, frame, row, column). Raises DataError.
    """
    datasets = [_open(path, pixels=True) for path in paths]
    name = paths[0].name
    decoded = [_decoded(dataset, path.name) for dataset, path in zip(datasets, paths, strict=True)]
    if len(decoded) == 1 and decoded[0].shape[1] > 1:
        spacing = _numbers(datasets[0], "PixelSpacing", 2)
        thickness = _numbers(datasets[0], "SpacingBetweenSlices", 1) or _numbers(datasets[0], "SliceThickness", 1)
        known = (*thickness, *spacing) if spacing is not None and thickness is not None else None
        return Image(voxels=decoded[0], spacing_mm=known)
    if len({frames.shape for frames in decoded}) != 1:
        raise DataError(f"{name}: the slices of its series differ in size. Separate them into series.")
    order, affine = _geometry(datasets, name)
    volume = np.concatenate([decoded[index] for index in order], axis=1)  # (channel, slice, row, column)
    try:
        return oriented(np.ascontiguousarray(volume.transpose(0, 3, 2, 1)), affine)
    except (ValueError, np.linalg.LinAlgError) as error:
        raise DataError(f"{name}: the geometry of its series is singular. Correct the headers or remove the series.") from error


def _geometry(datasets: list[Any], name: str) -> tuple[list[int], NDArray[np.float64]]:
    """Order of the slices, and the affine of (column, row, slice) indices to RAS millimetres (PS3.3 section C.7.6.2.1.1)."""
    positions, directions = [], []
    for dataset in datasets:
        position = _numbers(dataset, "ImagePositionPatient", 3)
        direction = _numbers(dataset, "ImageOrientationPatient", 6)
        if position is None or direction is None:
            raise DataError(f"{name}: ImagePositionPatient or ImageOrientationPatient is missing in its series. Restore or remove it.")
        positions.append(position)
        directions.append(direction)
    spacing = _numbers(datasets[0], "PixelSpacing", 2) or (1.0, 1.0)
    across, down = np.array(directions[0][:3]), np.array(directions[0][3:])
    if not np.allclose(directions, directions[0], atol=1e-3):
        raise DataError(f"{name}: the slices of its series differ in orientation. Separate them into series.")
    normal, corners = np.cross(across, down), np.array(positions)
    heights = corners @ normal
    order = np.argsort(heights, kind="stable")
    gaps = np.diff(heights[order])
    if len(gaps) and (gaps.min() < 1e-3 or gaps.max() > 1.1 * float(np.median(gaps))):
        raise DataError(f"{name}: the slices of its series are not evenly spaced; one is missing or double. Complete the series.")
    thickness = _numbers(datasets[0], "SliceThickness", 1) or (1.0,)
    step = corners[order[1]] - corners[order[0]] if len(order) > 1 else normal * thickness[0]
    affine = np.eye(4)
    affine[:3] = np.stack([across * spacing[1], down * spacing[0], step, corners[order[0]]], axis=1)
    return [int(index) for index in order], np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM points left and posterior


def _numbers(dataset: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    try:
        value = dataset.get(keyword)
        numbers = () if value is None else tuple(float(part) for part in (value if count > 1 else [value]))
    except Exception:  # a value that its type forbids fails on access; it counts as absent
        return None
    usable = len(numbers) == count and bool(np.isfinite(numbers).all())
    return numbers if usable and (count != 2 or min(numbers) > 0) else None


def _decoded(dataset: Any, name: str) -> Float32:
    """Pixels as (channel, frame, row, column) in modality units, MONOCHROME1 turned over so that bright is dense."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about padding bytes and the like
            stored = pixel_array(dataset)
            photometric = str(dataset.PhotometricInterpretation)
            if photometric == "PALETTE COLOR":
                stored = apply_color_lut(stored, dataset)
                stored = stored[..., :3] / (1 if stored.dtype == np.uint8 else 257)
            if int(dataset.get("SamplesPerPixel", 1)) == 1 and photometric != "PALETTE COLOR":
                if photometric == "MONOCHROME1":
                    stored = _turned_over(stored, dataset)
                stored = np.asarray(apply_modality_lut(stored, dataset))[..., None]
            frames = stored if int(dataset.get("NumberOfFrames") or 1) > 1 else stored[None]
    except Exception as error:  # decoders raise many kinds for broken pixels
        raise DataError(
            f"{name}: its pixel data cannot be decoded ({type(error).__name__}). Export it uncompressed, or remove it."
        ) from error
    if frames.ndim != 4:
        raise DataError(f"{name}: expected pixels of (frame, row, column, channel), found shape {frames.shape}. Export it again.")
    return np.ascontiguousarray(np.moveaxis(frames, -1, 0), dtype=np.float32)


def _turned_over(stored: NDArray[Any], dataset: Any) -> NDArray[Any]:
    bits, signed = int(dataset.BitsStored), int(dataset.PixelRepresentation) == 1
    return np.asarray((-1 if signed else 2**bits - 1) - stored.astype(np.int64))
