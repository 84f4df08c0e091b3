"""Genuine files of scanners and public sets, where a developer has them (DPSYNTH_DATA, default ../shared/data)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from dpsynth.config import DataConfig
from dpsynth.data.cohort import ImageSet
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.errors import DataError
from dpsynth.progress import silent

DATA = Path(os.environ.get("DPSYNTH_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
pytestmark = pytest.mark.slow


def present(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not in DPSYNTH_DATA; it is openly licensed and not shipped")
    return DATA / name


def read(config: DataConfig) -> ImageSet:
    images = prepare(read_cohort(config), config, progress=silent)
    assert np.isfinite(images.images).all()
    assert np.abs(images.images).max() <= 1
    assert images.images.std(axis=0).mean() > 0.05
    return images


def test_chest_x_rays() -> None:
    classes = ("normal", "bacteria", "virus")
    images = read(DataConfig(format="raster", path=present("kermany_cxr"), classes=classes, max_images_per_patient=31))
    assert (len(images.images), images.num_patients) == (5856, 3118)
    assert np.bincount(images.labels).tolist() == [1583, 2780, 1493]


def test_ct_slices_in_hounsfield_units(tmp_path: Path) -> None:
    folder = tmp_path / "ct"
    folder.symlink_to(present("ct_dicom"), target_is_directory=True)
    config = DataConfig(
        format="dicom",
        path=folder,
        classes=("M", "F"),
        label_column="PatientSex",
        spatial_shape=(64, 64),
        intensity_range=(-1000.0, 400.0),
    )
    cohort = read_cohort(config)
    assert (len(cohort.records), cohort.num_patients) == (43, 27)  # two slices are there twice
    for record in cohort.records[:5]:
        image = record.read()
        assert image.voxels.shape == (1, 512, 512)
        assert -1100 < np.median(image.voxels[0, 200:300, 200:300]) < 200  # chest: air to soft tissue
        assert image.spacing_mm is not None
        assert "age_years" in record.attributes
    read(config)


def test_pneumonia_and_adrenal_sets_of_medmnist() -> None:
    flat = DataConfig(format="medmnist", unit="image", path=present("pneumoniamnist.npz"))
    assert read(flat).images.shape == (4708, 1, 28, 28)
    solid = DataConfig(
        format="medmnist",
        unit="image",
        path=present("adrenalmnist3d.npz"),
        spatial_shape=(28, 28, 28),
        intensity_range=(0.0, 1.0),
    )
    stored = read_cohort(solid).records[0].read().voxels
    assert stored.shape == (1, 28, 28, 28)


def test_hippocampus_volumes_of_different_sizes(tmp_path: Path) -> None:
    source = present("hippocampus")
    (tmp_path / "images").symlink_to(source / "images", target_is_directory=True)
    rows = (source / "table.csv").read_text().splitlines()
    labelled = [f"{row.split(',')[0]},{row.split(',')[2]},{('a', 'b')[index % 2]}" for index, row in enumerate(rows[1:])]
    (tmp_path / "table.csv").write_text("\n".join(["file,patient_id,label", *labelled]) + "\n")
    config = DataConfig(format="nifti", path=tmp_path, classes=("a", "b"), spatial_shape=(32, 32, 32), intensity_range="each")
    images = read(config).images
    assert images.shape == (len(labelled), 1, 32, 32, 32)
    assert np.std(images, axis=(1, 2, 3, 4)).min() > 0.1  # their units differ by ten thousand
    with pytest.raises(DataError, match=r"half of it lies above.*each"):
        read(config.model_copy(update={"intensity_range": (0.0, 1000.0)}))
