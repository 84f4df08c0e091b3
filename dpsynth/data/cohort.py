"""One abstraction for every source: patients, their images, what is known about each. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsynth.errors import DataError
from dpsynth.privacy.unit import PrivacyUnit

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Image:
    """One decoded image: `voxels` (channel, *space) as stored, with its geometry where the format has one."""

    voxels: Float32
    spacing_mm: tuple[float, ...] | None = None
    affine: NDArray[np.float64] | None = None  # (4, 4), voxel indices to RAS+ millimetres, as in nibabel


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known about one image before it is decoded. `name` is a file name or an index, for messages on site."""

    patient_id: str
    name: str
    label: int  # index into the cohort's classes
    attributes: Mapping[str, str]  # sex, age_years, site, ... where there
    read: Callable[[], Image]


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Patients and their images, undecoded. With unit IMAGE each image is a patient of its own."""

    name: str
    unit: PrivacyUnit
    classes: tuple[str, ...]
    records: tuple[Record, ...]

    def __post_init__(self) -> None:
        if not self.records:
            raise DataError(f"Expected at least one image in {self.name!r}, found none. Check data.path.")

    @property
    def num_patients(self) -> int:
        """Distinct patients."""
        return len({record.patient_id for record in self.records})


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Preprocessed images grouped by patient.

    images: (num_images, channel, *space), float32 in [-1, 1]. labels, patients: (num_images,); `patients` holds indices
    into `patient_ids`, and every index of 0..num_patients-1 occurs. attributes: one mapping per image.
    """

    images: Float32
    labels: Int64
    patients: Int64
    patient_ids: tuple[str, ...]
    classes: tuple[str, ...]
    attributes: tuple[Mapping[str, str], ...]

    def __post_init__(self) -> None:
        counts = {len(self.images), len(self.labels), len(self.patients), len(self.attributes)}
        if len(counts) != 1:
            raise ValueError(f"Expected one label, patient and attribute mapping per image, got lengths {sorted(counts)}.")
        if set(np.unique(self.patients).tolist()) != set(range(len(self.patient_ids))):
            raise ValueError("Expected every patient to have at least one image and every image a known patient.")

    @property
    def num_patients(self) -> int:
        """Distinct patients."""
        return len(self.patient_ids)

    def rows_of(self) -> list[Int64]:
        """For each patient the row numbers of their images."""
        order = np.argsort(self.patients, kind="stable")
        bounds = np.searchsorted(self.patients[order], np.arange(1, self.num_patients))
        return [np.asarray(rows, dtype=np.int64) for rows in np.split(order, bounds)]

    def subset(self, patients: Int64) -> ImageSet:
        """The set of the given patients (indices), all their images, in the given order of patients."""
        rows_of = self.rows_of()
        chosen = [rows_of[int(patient)] for patient in patients]
        rows = np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)
        numbers = np.repeat(np.arange(len(chosen), dtype=np.int64), [len(part) for part in chosen])
        return ImageSet(
            images=self.images[rows],
            labels=self.labels[rows],
            patients=numbers,
            patient_ids=tuple(self.patient_ids[int(patient)] for patient in patients),
            classes=self.classes,
            attributes=tuple(self.attributes[int(row)] for row in rows),
        )
