"""The verb audit: read the cohort as it is, write down what is wrong with it and what could be left out. Nothing is changed or booked.

It needs neither a ledger nor a run, so that it comes before both. Its folder is for the data owner: it names files and shows patients.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpsynth import __version__
from dpsynth.artifacts import require_new, write_bytes, write_json
from dpsynth.audit.doubles import doubles
from dpsynth.audit.finding import Finding, Kind
from dpsynth.audit.labels import doubtful_labels
from dpsynth.audit.page import render
from dpsynth.audit.subgroups import Group, groups
from dpsynth.checks.burned_text import LIMITS, SMALLEST_SIDE, readable, text_scores
from dpsynth.config import Config, DataConfig
from dpsynth.data.attributes import require_columns, value_problem, with_values
from dpsynth.data.cohort import Cohort, Float32, Int64, Record
from dpsynth.data.exclusions import COLUMNS, has_permission, read_exclusions, require_permission_column, without_excluded
from dpsynth.data.preprocess import Preprocess, require_in_range
from dpsynth.data.source import listed
from dpsynth.data.validate import decoded, label_problem, require_some_label
from dpsynth.errors import DataError
from dpsynth.model.descriptors import descriptors
from dpsynth.progress import Progress, silent

PAGE, RECORD, PROPOSED = "audit.html", "audit.json", "exclusions.csv"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What was found. label_accuracy: mean recall of the classifier that judged the labels, 0 when none could be trained. text_images: how
    many images are large enough for text. not_looked_for: why no fault of a kind could be found, whatever there is. left_out: by reason,
    how many images the owner has left out already."""

    findings: tuple[Finding, ...]
    groups: tuple[Group, ...]
    patients: int
    images: int
    label_accuracy: float
    text_reader: str
    text_images: int
    not_looked_for: Mapping[Kind, str]
    left_out: Mapping[str, int]

    def lines(self) -> list[str]:
        """A line for each kind, and for the small subgroups."""
        counts = Counter(finding.kind for finding in self.findings)
        small = [group.name for group in self.groups if group.small]
        found = [self._line(kind, counts[kind]) for kind in Kind]
        before = [f"{sum(self.left_out.values())} images were left out before"] if self.left_out else []
        return [f"{self.images} images of {self.patients} patients", *before, *found, f"{len(small):>5}  small subgroups" + _first(small)]

    def _line(self, kind: Kind, count: int) -> str:
        reason = self.not_looked_for.get(kind)
        return f"{count:>5}  {kind.value}" if reason is None else f"    -  {kind.value}: not looked for, since {reason}"

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures."""
        return {
            "schema": SCHEMA,
            "dpsynth": __version__,
            "images": self.images,
            "patients": self.patients,
            "text_reader": self.text_reader,
            "text_images": self.text_images,
            "label_accuracy": self.label_accuracy,
            "left_out": dict(self.left_out),
            "not_looked_for": {kind.name.lower(): reason for kind, reason in self.not_looked_for.items()},
            "findings": [finding.to_json() for finding in self.findings],
            "groups": [{**asdict(group), "small": group.small} for group in self.groups],
        }


def _first(names: list[str]) -> str:
    return f": {'; '.join(names[:5])}{'; ...' if len(names) > 5 else ''}" if names else ""


def audit(config: Config, *, out: Path, progress: Progress) -> Audit:
    """Write audit.html, audit.json and exclusions.csv into the new folder `out`. Raises ArtifactError when something is there, DataError
    for data that cannot be listed."""
    require_new(out)
    cohort = without_excluded(listed(config.data), config.data)
    require_some_label(cohort, config.data)
    require_permission_column(cohort, config.data)
    require_columns(cohort, config.data)
    images, rows, findings, text_images = _decoded(cohort, config, progress)
    usable = [cohort.records[row] for row in rows]
    names = [record.name for record in usable]
    numbers = {patient: number for number, patient in enumerate(dict.fromkeys(record.patient_id for record in usable))}
    patients = np.array([numbers[record.patient_id] for record in usable], dtype=np.int64)
    shown = {row: number for number, row in enumerate(rows)}
    for row, record in enumerate(cohort.records):
        found = _of_table(record, cohort.classes, config.data)
        findings += [replace(finding, rows=(shown[row],) if row in shown else ()) for finding in found]
    accuracy = 0.0
    if usable:
        findings += doubles(images, patients, list(numbers), names, progress=progress)
        found, accuracy = _doubtful(images, usable, patients, config.data.classes, progress)
        findings += found
    result = Audit(
        findings=tuple(sorted(findings, key=lambda finding: list(Kind).index(finding.kind))),
        groups=tuple(groups(_countable(cohort, config.data), config.data.classes, tuple(config.data.attributes))),
        patients=cohort.num_patients,
        images=len(cohort.records),
        label_accuracy=accuracy,
        text_reader=config.gate.content.text,
        text_images=text_images,
        left_out=Counter(read_exclusions(config.data.exclusions).values()) if config.data.exclusions else {},
        not_looked_for=_not_looked_for(config.data, text_images=text_images, accuracy=accuracy, patients=patients),
    )
    write_json(out / RECORD, result.to_json(), private=True)
    write_bytes(out / PROPOSED, proposed_exclusions(result.findings).encode(), private=True)
    write_bytes(out / PAGE, render(result.to_json(), result.findings, images, name=config.data.name).encode(), private=True)
    return result


def _not_looked_for(config: DataConfig, *, text_images: int, accuracy: float, patients: Int64) -> dict[Kind, str]:
    """Kinds of which nothing can be found here, with the reason."""
    found = {}
    if config.permission_column is None:
        found[Kind.PERMISSION] = "no data.permission_column is declared"
    if not config.attributes:
        found[Kind.VALUE] = "no data.attributes are declared"
    if not text_images:
        found[Kind.TEXT] = f"no image is stored with {SMALLEST_SIDE} pixels a side, below which no text can be read"
    if not (np.bincount(patients) > 1).any():
        found[Kind.PERSON] = "nobody has two images, and one alone that is alike is a near-duplicate"
    if not accuracy:
        found[Kind.LABEL] = "a class has too few images to train a classifier, or there is one class"
    return found


def _doubtful(
    images: Float32, records: list[Record], patients: Int64, classes: tuple[str, ...], progress: Progress
) -> tuple[list[Finding], float]:
    """Doubts about the labels that are on the public list, and the accuracy of the classifier."""
    known = np.flatnonzero([record.label < len(classes) for record in records])
    labels = np.array([records[row].label for row in known], dtype=np.int64)
    names = [records[row].name for row in known]
    found, accuracy = doubtful_labels(descriptors(images[known]), labels, patients[known], names, classes, progress=progress)
    return [replace(finding, rows=tuple(int(known[row]) for row in finding.rows)) for finding in found], accuracy


def _of_table(record: Record, stored: tuple[str, ...], config: DataConfig) -> list[Finding]:
    """What the table or the header says of an image that cannot be."""
    problems = {
        Kind.PERMISSION: "" if has_permission(record, config) else "its permission is not one that means yes",
        Kind.CLASS: label_problem(record, stored, config),
        Kind.VALUE: value_problem(record, config),
    }
    return [
        Finding(kind=kind, images=(record.name,), proposed=(record.name,), detail=detail) for kind, detail in problems.items() if detail
    ]


def _countable(cohort: Cohort, config: DataConfig) -> tuple[Record, ...]:
    """The records that can be counted under a class and declared values; the others are findings."""
    return tuple(with_values(r, config) for r in cohort.records if r.label < len(config.classes) and not value_problem(r, config))


def _decoded(cohort: Cohort, config: Config, progress: Progress) -> tuple[Float32, list[int], list[Finding], int]:
    """Images as they would be trained on, with their rows in the cohort; findings on single images: unusable, and text as stored; how
    many are stored large enough for text."""
    transform = Preprocess(config.data.spatial_shape, config.data.intensity_range)
    kept: list[Float32] = []
    rows: list[int] = []
    findings: list[Finding] = []
    text_images = 0
    for row, record in enumerate(cohort.records):
        try:
            stored = decoded(record, dimensions=len(config.data.spatial_shape), channels=config.data.channels)
            require_in_range(stored.voxels, record.name, config.data.intensity_range)
            image = transform(stored.voxels, spacing_mm=stored.spacing_mm)
        except DataError as error:
            findings.append(Finding(kind=Kind.UNUSABLE, images=(record.name,), proposed=(record.name,), detail=str(error)))
            continue
        finding = _image_finding(record, stored.voxels, image, config, row=len(kept))
        findings += [finding] if finding else []
        text_images += readable(stored.voxels.shape)
        kept.append(image)
        rows.append(row)
        if row % 20 == 19 or row + 1 == len(cohort.records):
            progress("read images", row + 1, len(cohort.records))
    shape = (0, config.data.channels, *config.data.spatial_shape)
    return (np.stack(kept) if kept else np.empty(shape, dtype=np.float32)), rows, findings, text_images


def _image_finding(record: Record, stored: Float32, image: Float32, config: Config, *, row: int) -> Finding | None:
    if (share := float((image >= 1).mean())) > config.gate.content.saturated[1] or image.std() < config.gate.content.contrast[1]:
        detail = f"{share:.0%} of it is at the upper end, standard deviation {image.std():.3f}"
        return Finding(kind=Kind.UNUSABLE, images=(record.name,), proposed=(record.name,), detail=detail, rows=(row,))
    reader = config.gate.content.text
    low, high = float(stored.min()), float(stored.max())
    whole = np.asarray((stored - low) / (high - low) * 2 - 1, dtype=np.float32)
    score = float(text_scores(whole[None], reader=reader, task="images", progress=silent)[0]) if readable(whole.shape) else 0.0
    if score <= LIMITS[reader]:
        return None
    detail = f"{score:.0f} letters on a line" if reader == "strokes" else f"read with confidence {score:.2f}"
    return Finding(kind=Kind.TEXT, images=(record.name,), proposed=(record.name,), detail=detail, rows=(row,))


def proposed_exclusions(findings: tuple[Finding, ...]) -> str:
    """CSV text that `data.exclusions` reads; an image with several faults has one line."""
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        for name in finding.proposed:
            reasons.setdefault(name, []).append(finding.kind.value)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((name, "; ".join(dict.fromkeys(why))) for name, why in reasons.items())
    return text.getvalue()
