"""The table.csv of an image folder: which file belongs to which patient, with which label."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dpsynth.errors import DataError

NAME = "table.csv"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image of the table. `file` is relative to the folder; attributes are the other columns."""

    file: str
    patient_id: str
    label: str
    attributes: Mapping[str, str]


def read_table(folder: Path, *, label_column: str, suffixes: tuple[str, ...], any_label: bool = False) -> tuple[Row, ...]:
    """Rows in the order of the table; every image has one row and every row one image, else DataError names the first fault.

    any_label: rows whose label is empty are rows too.
    """
    path = folder / NAME
    if not folder.is_dir():
        raise DataError(f"Expected a folder at {folder}, found none. Check data.path.")
    if not path.is_file():
        raise DataError(f"Expected {NAME} in {folder.name}, with columns file, patient_id and {label_column}. Found none.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            missing = {"file", "patient_id", label_column} - set(reader.fieldnames or ())
            if missing:
                wanted = f"expected the columns file, patient_id and {label_column}"
                raise DataError(f"{NAME}: {wanted}; missing: {', '.join(sorted(missing))}.")
            rows = tuple(_row(raw, number, label_column, any_label=any_label) for number, raw in enumerate(reader, 2))
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{NAME}: it is not a readable CSV file in UTF-8 ({error}).") from error
    _require_one_to_one(folder, rows, suffixes)
    return rows


def _row(raw: Mapping[str | None, str | list[str] | None], number: int, label_column: str, *, any_label: bool) -> Row:
    values = {key: value for key, value in raw.items() if isinstance(key, str) and isinstance(value, str)}
    if len(values) != len(raw):
        raise DataError(f"{NAME} line {number}: expected as many fields as columns.")
    for column in ("file", "patient_id", *([] if any_label else [label_column])):
        if not values[column].strip():
            raise DataError(f"{NAME} line {number}: {column} is empty.")
    relative = PurePosixPath(values["file"].strip())
    if relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"{NAME} line {number}: file must lie inside the folder. Name it relative to the folder.")
    if not str(relative).isprintable():
        raise DataError(f"{NAME} line {number}: the file name holds control characters. Rename the file.")
    known = ("file", "patient_id", label_column)
    others = {key: value.strip() for key, value in values.items() if key not in known and value.strip()}
    patient_id, label = values["patient_id"].strip(), values[label_column].strip()
    return Row(file=str(relative), patient_id=patient_id, label=label, attributes=others)


def _require_one_to_one(folder: Path, rows: tuple[Row, ...], suffixes: tuple[str, ...]) -> None:
    seen: set[str] = set()
    for number, row in enumerate(rows, 2):
        if row.file in seen:
            raise DataError(f"{NAME} line {number}: {row.file} appears twice. Keep one row per image.")
        seen.add(row.file)
        if not os.path.isfile(folder / row.file):  # noqa: PTH113 - unlike Path.is_file, false for a name that is too long
            raise DataError(f"{NAME} line {number}: there is no file {row.file}.")
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name.lower().endswith(suffixes)}
    without = sorted(present - seen)
    if without:
        raise DataError(f"{NAME}: {len(without)} images have no row, the first is {without[0]!r}. Add rows or remove the files.")
    if not rows:
        raise DataError(f"Expected at least one image in {folder.name}, found none.")
