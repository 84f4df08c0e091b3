"""Which patient is at which site, which of them are kept for testing, and the folders that the sites have."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpsynth.config import Config
from dpsynth.data.phantom import phantom_cohort
from dpsynth.data.preprocess import prepare
from dpsynth.data.raster import write_png
from dpsynth.data.source import read_cohort
from dpsynth.progress import silent

TEST_SHARE = 0.2
FEWEST = 40  # patients of a site: fewer could not take part
_CONCENTRATION = 0.7  # of the Dirichlet distribution by which a label's patients go to the sites when they are skewed


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image of a table."""

    file: str
    patient: str
    label: str


def small_images(source: Path | None, folder: Path, *, side: int, classes: tuple[str, ...], joined: dict[str, str]) -> tuple[Row, ...]:
    """All images of a data set at `side` pixels in `folder`, made once; `joined` renames labels. Without a source: procedural ones."""
    if not (folder / "table.csv").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if source is None:
            cohort = phantom_cohort(
                anatomy="chest", num_patients=300, max_images=2, spatial_shape=(side, side), channels=1, classes=classes, seed=3, name="p"
            )  # fmt: skip
            rows = [Row(file=f"{i}.png", patient=r.patient_id, label=classes[r.label]) for i, r in enumerate(cohort.records)]
            images = np.stack([record.read().voxels for record in cohort.records]).astype(np.float32) / np.float32(127.5) - 1
        else:
            data = {"format": "raster", "path": source, "classes": classes, "spatial_shape": (side, side), "max_images_per_patient": 8}
            config = Config.model_validate({"data": data})
            found = prepare(read_cohort(config.data), config.data, progress=silent)
            patients = [found.patient_ids[int(number)] for number in found.patients]
            labels = [found.classes[int(label)] for label in found.labels]
            rows = [
                Row(file=f"{i}.png", patient=p, label=joined.get(name, name))
                for i, (p, name) in enumerate(zip(patients, labels, strict=True))
            ]
            images = found.images
        for row, image in zip(rows, images, strict=True):
            write_png(folder / row.file, image, text={})
        write_table(folder, rows)
    with (folder / "table.csv").open(newline="", encoding="utf-8") as file:
        return tuple(Row(file=row["file"], patient=row["patient_id"], label=row["label"]) for row in csv.DictReader(file))


def write_table(folder: Path, rows: Sequence[Row]) -> None:
    """table.csv, written last: a folder without one is unfinished."""
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "patient_id", "label"))
        writer.writerows((row.file, row.patient, row.label) for row in rows)


def linked(source: Path, folder: Path, rows: Sequence[Row]) -> Path:
    """A folder with these rows' images alone."""
    if not (folder / "table.csv").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for row in rows:
            if not (folder / row.file).exists():
                os.link(source / row.file, folder / row.file)
        write_table(folder, rows)
    return folder


def without_test(rows: Sequence[Row], seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Rows for training and for testing; a patient is on one side."""
    patients = sorted({row.patient for row in rows})
    chosen = set(np.random.default_rng([seed, 1]).permutation(patients)[: round(TEST_SHARE * len(patients))].tolist())
    return tuple(row for row in rows if row.patient not in chosen), tuple(row for row in rows if row.patient in chosen)


def sites_of(rows: Sequence[Row], sites: int, *, skewed: bool, seed: int) -> list[tuple[Row, ...]]:
    """The rows of each site: patients dealt out evenly, or those of each label by shares drawn from a Dirichlet distribution."""
    label_of = {row.patient: row.label for row in reversed(rows)}  # that of the first image
    rng = np.random.default_rng([seed, 2, sites])
    while True:
        site_of: dict[str, int] = {}
        for label in sorted(set(label_of.values())) if skewed else [None]:
            patients = rng.permutation(sorted(patient for patient, own in label_of.items() if label in (None, own)))
            shares = rng.dirichlet([_CONCENTRATION] * sites) if skewed else np.full(sites, 1 / sites)
            ends = np.rint(np.cumsum(shares) * len(patients))
            site_of |= {str(patient): int(np.searchsorted(ends, index, side="right")) for index, patient in enumerate(patients)}
        if np.bincount(list(site_of.values()), minlength=sites).min() >= FEWEST:
            return [tuple(row for row in rows if site_of[row.patient] == site) for site in range(sites)]


def declared(rows: Sequence[Row]) -> int:
    """A public, rounded number of patients: two digits."""
    count = len({row.patient for row in rows})
    unit = int(10 ** max(len(str(count)) - 2, 0))
    return max(round(count / unit) * unit, 1)
