"""Which images the data owner leaves out, and which may not be used. Both are settled before anything else. Torch-free."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dpsynth.config import DataConfig
from dpsynth.data.cohort import Cohort, Record
from dpsynth.errors import DataError

COLUMNS = ("image", "reason")


def read_exclusions(path: Path) -> dict[str, str]:
    """Reason by image name. Raises DataError for a file that is no such list, an image named twice or without a reason."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            if missing := set(COLUMNS) - set(reader.fieldnames or ()):
                raise DataError(f"{path.name}: expected the columns image and reason; missing: {', '.join(sorted(missing))}.")
            found: dict[str, str] = {}
            for number, row in enumerate(reader, 2):
                image, reason = ((row[column] or "").strip() for column in COLUMNS)
                if not image or not reason:
                    raise DataError(f"{path.name} line {number}: expected an image and a reason. Fill in both or remove the line.")
                if image in found:
                    raise DataError(f"{path.name} line {number}: {image} appears twice. Keep one line per image.")
                found[image] = reason
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f"Expected a readable CSV file at data.exclusions: {error}.") from error
    return found


def without_excluded(cohort: Cohort, config: DataConfig) -> Cohort:
    """The cohort without the images of `data.exclusions`. Raises DataError for a name that no image has: a slip would let one in."""
    if config.exclusions is None:
        return cohort
    excluded = read_exclusions(config.exclusions)
    names = {record.name for record in cohort.records}
    if unknown := sorted(excluded.keys() - names):
        raise DataError(f"{config.exclusions.name}: {len(unknown)} names have no image, the first is {unknown[0]!r}. Correct the list.")
    return replace(cohort, records=tuple(record for record in cohort.records if record.name not in excluded))


def has_permission(record: Record, config: DataConfig) -> bool:
    """Whether the image may be used: always, where no column of permissions is declared."""
    if config.permission_column is None:
        return True
    attributes: Mapping[str, str] = record.attributes
    return attributes.get(config.permission_column, "") in config.permission_values


def require_permission_column(cohort: Cohort, config: DataConfig) -> None:
    """Raise DataError when no image has a value in the declared column: its name is wrong then, and nobody's permission is known."""
    present = {key for record in cohort.records for key in record.attributes}
    if config.permission_column is not None and config.permission_column not in present:
        raise DataError(
            f"data.permission_column: no image has a value of {config.permission_column!r}; there are: "
            f"{', '.join(sorted(present)) or 'none'}. Correct the column."
        )


def require_permission(cohort: Cohort, config: DataConfig) -> None:
    """Raise DataError when an image that is to be used has no permission."""
    require_permission_column(cohort, config)
    without = [record.name for record in cohort.records if not has_permission(record, config)]
    if without:
        raise DataError(
            f"{len(without)} images have no permission in {config.permission_column!r}, the first is {without[0]}. "
            "Put them into data.exclusions; `dpsynth audit` writes the list."
        )
