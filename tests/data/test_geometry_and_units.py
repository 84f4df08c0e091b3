"""DICOM and NIfTI intensities and axes against values worked out by hand."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from dpsynth.data.dicom import read_dicom, read_picture, read_series
from dpsynth.data.dicom_marking import SyntheticSubject, write_dicom
from dpsynth.data.nifti import read_volume
from dpsynth.data.orientation import oriented
from dpsynth.errors import DataError
from dpsynth.privacy.unit import PrivacyUnit


def written(path: Path, pixels: np.ndarray, **elements: object) -> Path:
    """A DICOM file with exactly these stored pixels and header elements."""
    subject = SyntheticSubject(run_id="r", sample_id=path.stem, label="normal")
    write_dicom(path, (pixels[None] / 127.5 - 1).astype(np.float32), subject=subject, marking={})
    dataset = pydicom.dcmread(path)
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path)
    return path


RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8)


def test_slope_and_intercept_are_applied(tmp_path: Path) -> None:
    path = written(tmp_path / "a.dcm", RAMP, RescaleSlope=2, RescaleIntercept=-1024, RescaleType="HU")
    assert np.array_equal(read_picture(path).voxels[0], RAMP * 2.0 - 1024)


def test_monochrome1_is_turned_over_so_that_bright_is_dense(tmp_path: Path) -> None:
    path = written(tmp_path / "a.dcm", RAMP, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(read_picture(path).voxels[0], 255.0 - RAMP)


def test_monochrome1_of_12_bits_is_turned_over_within_12_bits(tmp_path: Path) -> None:
    stored = (RAMP.astype("<u2") * 60).tobytes()
    path = written(
        tmp_path / "a.dcm",
        RAMP,
        PhotometricInterpretation="MONOCHROME1",
        BitsAllocated=16,
        BitsStored=12,
        HighBit=11,
        PixelData=stored,
    )
    assert np.array_equal(read_picture(path).voxels[0], 4095.0 - RAMP * 60.0)


def test_pixel_spacing_is_row_then_column(tmp_path: Path) -> None:
    assert read_picture(written(tmp_path / "a.dcm", RAMP, PixelSpacing=[2, 3])).spacing_mm == (2.0, 3.0)
    assert read_picture(written(tmp_path / "b.dcm", RAMP)).spacing_mm is None


def series(folder: Path, heights: list[float], **elements: object) -> list[Path]:
    """Axial slices whose pixel value is their height; files in an order unlike that of the heights."""
    folder.mkdir(exist_ok=True)
    paths = []
    for number, height in enumerate(heights):
        geometry = {
            "SeriesInstanceUID": "2.25.7",
            "ImagePositionPatient": [10, 20, height],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [2, 3],
        }
        paths.append(written(folder / f"{number}.dcm", np.full((4, 6), int(height), np.uint8) + RAMP[:4, :6] % 2, **geometry, **elements))
    return paths


def test_slices_are_sorted_by_height_and_turned_to_right_anterior_superior(tmp_path: Path) -> None:
    image = read_series(tuple(series(tmp_path / "s", [30, 10, 20, 0])))
    assert image.voxels.shape == (1, 6, 4, 4)
    assert np.array_equal(image.voxels[0, 0, 0] // 2 * 2, [0, 10, 20, 30])
    assert image.spacing_mm == (3.0, 2.0, 10.0)
    assert image.affine is not None
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    # The first DICOM voxel lies 10 mm left... of the origin: x = -10 in RAS, and it is the last one along R after the turn.
    assert np.allclose(image.affine @ [5, 3, 0, 1], [-10, -20, 0, 1])


def test_a_series_is_one_record_with_its_patient(tmp_path: Path) -> None:
    for path in series(tmp_path / "s", [0, 1, 2]):
        dataset = pydicom.dcmread(path)
        dataset.PatientID = "P1"
        dataset.save_as(path)
    cohort = read_dicom(
        tmp_path / "s", name="x", unit=PrivacyUnit.PATIENT, classes=("normal",), label_column="SeriesDescription", dimensions=3
    )
    assert [record.patient_id for record in cohort.records] == ["P1"]
    assert cohort.records[0].read().voxels.shape == (1, 6, 4, 3)


def test_a_series_of_two_patients_is_refused(tmp_path: Path) -> None:
    series(tmp_path / "s", [0, 1, 2])  # each file has a patient of its own
    with pytest.raises(DataError, match="another patient or label"):
        read_dicom(
            tmp_path / "s",
            name="x",
            unit=PrivacyUnit.PATIENT,
            classes=("normal",),
            label_column="SeriesDescription",
            dimensions=3,
        )


@pytest.mark.parametrize("heights", [[0, 1, 2, 4], [0, 1, 1, 2]])
def test_a_missing_or_double_slice_is_refused(tmp_path: Path, heights: list[float]) -> None:
    with pytest.raises(DataError, match="not evenly spaced"):
        read_series(tuple(series(tmp_path / "s", heights)))


def test_slices_without_position_are_refused(tmp_path: Path) -> None:
    paths = series(tmp_path / "s", [0, 1])
    dataset = pydicom.dcmread(paths[1])
    del dataset.ImagePositionPatient
    dataset.save_as(paths[1])
    with pytest.raises(DataError, match="ImagePositionPatient"):
        read_series(tuple(paths))


def test_the_table_wins_over_the_header(tmp_path: Path) -> None:
    for name in ("a", "b"):
        written(tmp_path / f"{name}.dcm", RAMP)
    (tmp_path / "table.csv").write_text("file,patient_id,label\na.dcm,P1,lesion\nb.dcm,P1,lesion\n")
    cohort = read_dicom(tmp_path, name="x", unit=PrivacyUnit.PATIENT, classes=("normal", "lesion"), label_column="label", dimensions=2)
    assert [(record.patient_id, record.label) for record in cohort.records] == [("P1", 1), ("P1", 1)]
    (tmp_path / "table.csv").write_text("patient_id,label\nSYN-a,lesion\nSYN-b,normal\n")
    cohort = read_dicom(tmp_path, name="x", unit=PrivacyUnit.PATIENT, classes=("normal", "lesion"), label_column="label", dimensions=2)
    assert [(record.patient_id, record.label) for record in cohort.records] == [("SYN-a", 1), ("SYN-b", 0)]


def test_a_copy_of_an_image_counts_once(tmp_path: Path) -> None:
    content = written(tmp_path / "a.dcm", RAMP).read_bytes()
    written(tmp_path / "b.dcm", RAMP)
    (tmp_path / "copy.dcm").write_bytes(content)
    cohort = read_dicom(tmp_path, name="x", unit=PrivacyUnit.IMAGE, classes=("normal",), label_column="SeriesDescription", dimensions=2)
    assert [record.name for record in cohort.records] == ["a.dcm", "b.dcm"]


@pytest.mark.parametrize("codes", [("R", "A", "S"), ("L", "P", "S"), ("S", "R", "A"), ("A", "I", "L")])
def test_a_volume_looks_the_same_whatever_the_axes_of_its_file(tmp_path: Path, codes: tuple[str, str, str]) -> None:
    voxels = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    affine = np.array([[2.0, 0, 0, -3], [0, 3, 0, 5], [0, 0, 4, 7], [0, 0, 0, 1]])
    turn = nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(affine), nibabel.orientations.axcodes2ornt(codes))
    nibabel.Nifti1Image(voxels, affine).as_reoriented(turn).to_filename(tmp_path / "a.nii")
    image = read_volume(tmp_path / "a.nii")
    assert np.array_equal(image.voxels[0], voxels)
    assert image.affine is not None
    assert np.allclose(image.affine, affine)
    assert image.spacing_mm == (2.0, 3.0, 4.0)


def test_scaling_of_a_nifti_file_is_applied(tmp_path: Path) -> None:
    file = nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    file.header.set_slope_inter(0.5, -3)
    file.to_filename(tmp_path / "a.nii")
    stored = np.frombuffer((tmp_path / "a.nii").read_bytes()[-120:], dtype="<i2").reshape(3, 4, 5, order="F")
    assert np.allclose(read_volume(tmp_path / "a.nii").voxels[0], stored * 0.5 - 3)


def test_one_slice_is_shown_with_anterior_on_top_and_right_on_the_left(tmp_path: Path) -> None:
    voxels = np.zeros((4, 5, 1), dtype=np.float32)
    voxels[3, 4, 0] = 1  # the most right and most anterior voxel of RAS axes
    nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(tmp_path / "a.nii")
    picture = read_volume(tmp_path / "a.nii").voxels
    assert picture.shape == (1, 5, 4)
    assert picture[0, 0, 0] == 1
    assert picture.sum() == 1


def test_a_singular_affine_is_refused() -> None:
    with pytest.raises(ValueError, match="singular"):
        oriented(np.zeros((1, 2, 2, 2), dtype=np.float32), np.zeros((4, 4)))
