"""Small folders as users have them, one for each format, and the configuration that reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dpsynth.config import DataConfig
from dpsynth.data.cohort import Float32
from dpsynth.data.dicom_marking import SyntheticSubject, write_dicom
from dpsynth.data.nifti import write_nifti
from dpsynth.data.raster import write_png

PATIENTS = 24
Builder = Callable[[], tuple[Path, DataConfig]]


def pictures(*shape: int) -> Float32:
    """One image (*shape) a patient in [-1, 1], no two alike."""
    return np.random.default_rng(3).uniform(-1, 1, (PATIENTS, *shape)).astype(np.float32)


def label_of(index: int) -> str:
    return ("normal", "lesion")[index % 2]


def table(folder: Path, suffix: str) -> None:
    rows = [f"i{index:02d}{suffix},P{index:02d},{label_of(index)},F" for index in range(PATIENTS)]
    (folder / "table.csv").write_text("\n".join(["file,patient_id,label,sex", *rows]) + "\n")


@pytest.fixture
def raster(tmp_path: Path) -> tuple[Path, DataConfig]:
    folder = tmp_path / "raster"
    folder.mkdir()
    for index, image in enumerate(pictures(1, 12, 12)):
        write_png(folder / f"i{index:02d}.png", image, text={})
    table(folder, ".png")
    return folder, DataConfig(format="raster", path=folder, spatial_shape=(12, 12))


@pytest.fixture
def medmnist(tmp_path: Path) -> tuple[Path, DataConfig]:
    path = tmp_path / "set.npz"
    images = np.random.default_rng(3).integers(0, 256, (PATIENTS, 12, 12), dtype=np.uint8)
    labels = (np.arange(PATIENTS) % 2).astype(np.uint8)[:, None]
    np.savez(path, train_images=images, train_labels=labels)
    return path, DataConfig(format="medmnist", path=path, spatial_shape=(12, 12), unit="image")


@pytest.fixture
def nifti(tmp_path: Path) -> tuple[Path, DataConfig]:
    folder = tmp_path / "nifti"
    folder.mkdir()
    for index, image in enumerate(pictures(1, 8, 8, 8)):
        write_nifti(folder / f"i{index:02d}.nii.gz", image, spacing_mm=(1.0, 1.0, 1.0), marking={})
    table(folder, ".nii.gz")
    return folder, DataConfig(format="nifti", path=folder, spatial_shape=(8, 8, 8))


@pytest.fixture
def dicom(tmp_path: Path) -> tuple[Path, DataConfig]:
    folder = tmp_path / "dicom"
    folder.mkdir()
    for index, image in enumerate(pictures(1, 12, 12)):
        subject = SyntheticSubject(run_id="run", sample_id=f"{index:02d}", label=label_of(index), sex="F", age_years=50)
        write_dicom(folder / f"i{index:02d}.dcm", image, subject=subject, marking={})
    return folder, DataConfig(format="dicom", path=folder, spatial_shape=(12, 12), label_column="SeriesDescription")
