"""What a writer writes, the reader of the format and the field's own tools read back; equal images give equal bytes."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image as Pillow

from dpsynth.data.dicom import read_dicom, read_picture, read_series
from dpsynth.data.dicom_marking import SyntheticSubject, write_dicom
from dpsynth.data.medmnist import read_medmnist, write_npz
from dpsynth.data.nifti import read_marking, read_nifti, read_volume, write_nifti
from dpsynth.data.raster import read_image, write_png
from dpsynth.errors import DataError
from dpsynth.privacy.unit import PrivacyUnit

SUBJECT = SyntheticSubject(run_id="run 1", sample_id="000007", label="lesion", sex="F", age_years=54)


def levels(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Random 8-bit levels, and the same in [-1, 1]."""
    stored = np.random.default_rng(1).integers(0, 256, shape)
    return stored.astype(np.float32), (stored / 127.5 - 1).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3])
def test_png(tmp_path: Path, channels: int) -> None:
    stored, image = levels(channels, 9, 14)
    write_png(tmp_path / "a.png", image, text={"Synthetic": "yes, not for diagnostic use"})
    assert np.array_equal(read_image(tmp_path / "a.png", channels=channels).voxels, stored)
    with Pillow.open(tmp_path / "a.png") as picture:
        assert picture.text["Synthetic"] == "yes, not for diagnostic use"  # type: ignore[attr-defined]
    write_png(tmp_path / "b.png", image, text={"Synthetic": "yes, not for diagnostic use"})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("shape", [(1, 9, 14), (3, 9, 14), (1, 5, 6, 7)])
def test_npz(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stored, _ = levels(4, *shape)
    labels = np.array([0, 1, 1, 2])
    extra = {"synthetic": np.array([1], dtype=np.uint8), "provenance": np.frombuffer(b'{"run": 1}', dtype=np.uint8)}
    for name in ("a.npz", "b.npz"):
        write_npz(tmp_path / name, images=stored.astype(np.uint8), labels=labels, extra=extra)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    cohort = read_medmnist(tmp_path / "a.npz", name="x", split="train", classes=("a", "b", "c"), dimensions=len(shape) - 1)
    assert [record.label for record in cohort.records] == [0, 1, 1, 2]
    assert np.array_equal(np.stack([record.read().voxels for record in cohort.records]), stored)
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["train_labels"].shape == (4, 1)
        assert arrays["train_images"].shape == (4, *shape[1:]) + ((3,) if shape[0] == 3 else ())
        assert arrays["test_images"].shape == (0, *arrays["train_images"].shape[1:])
        assert arrays["synthetic"] == 1
        assert bytes(arrays["provenance"]) == b'{"run": 1}'


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("shape", [(1, 5, 6, 7), (3, 5, 6, 7), (1, 9, 14), (3, 9, 14)])
def test_nifti(tmp_path: Path, shape: tuple[int, ...], name: str) -> None:
    stored, image = levels(*shape)
    spacing = (1.5, 2.0, 3.0)[: len(shape) - 1]
    for folder in ("one", "two"):
        write_nifti(tmp_path / folder / name, image, spacing_mm=spacing, marking={"run": "r", "sample": 3})
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    if name.endswith(".gz"):
        assert (tmp_path / "one" / name).read_bytes()[4:8] == bytes(4)  # no time of writing
    back = read_volume(tmp_path / "one" / name)
    assert np.array_equal(back.voxels, stored)
    assert back.spacing_mm == spacing
    assert read_marking(tmp_path / "one" / name) == {"run": "r", "sample": 3, "synthetic": True}
    file = nibabel.load(tmp_path / "one" / name)
    assert b"SYNTHETIC" in bytes(file.header["descrip"])
    assert nibabel.aff2axcodes(file.affine) == ("R", "A", "S")


def test_nifti_folder(tmp_path: Path) -> None:
    stored, image = levels(1, 8, 8, 8)
    write_nifti(tmp_path / "a.nii.gz", image, spacing_mm=None, marking={})
    (tmp_path / "table.csv").write_text("file,patient_id,label,sex\na.nii.gz,P1,lesion,F\n")
    for unit, patient in ((PrivacyUnit.PATIENT, "P1"), (PrivacyUnit.IMAGE, "a.nii.gz")):
        (record,) = read_nifti(tmp_path, name="x", unit=unit, classes=("normal", "lesion"), label_column="label").records
        assert (record.patient_id, record.label, record.attributes) == (patient, 1, {"sex": "F"})
        assert np.array_equal(record.read().voxels, stored)


@pytest.mark.parametrize("shape", [(1, 9, 13), (3, 9, 13), (1, 5, 6, 7)])
def test_dicom(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stored, image = levels(*shape)
    for name in ("one/a.dcm", "two/a.dcm"):
        write_dicom(tmp_path / name, image, subject=SUBJECT, marking={"run": "r", "epsilon": "10"})
    path = tmp_path / "one" / "a.dcm"
    assert path.read_bytes() == (tmp_path / "two" / "a.dcm").read_bytes()
    back = read_picture(path) if len(shape) == 3 else read_series((path,))
    assert np.array_equal(back.voxels, stored)
    (record,) = read_dicom(
        tmp_path / "one",
        name="x",
        unit=PrivacyUnit.PATIENT,
        classes=("normal", "lesion"),
        label_column="SeriesDescription",
        dimensions=len(shape) - 1,
    ).records
    assert (record.patient_id, record.label) == ("SYN-000007", 1)
    assert record.attributes == {"sex": "F", "age_years": "54"}
    assert np.array_equal(record.read().voxels, stored)


def test_dicom_says_synthetic_wherever_a_reader_may_look(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", levels(1, 9, 9)[1], subject=SUBJECT, marking={"epsilon": "10"})
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    assert dataset[0x0008001C].value == "YES"
    assert dataset.ImageType[0] == "DERIVED"
    assert "epsilon=10" in dataset.DerivationDescription
    assert dataset.PatientIdentityRemoved == "YES"
    assert str(dataset.PatientName).startswith("SYNTHETIC")
    assert dataset.PatientBirthDate == ""
    assert dataset.ContributingEquipmentSequence[0].PurposeOfReferenceCodeSequence[0].CodeValue == "109102"
    uids = [dataset.SOPInstanceUID, dataset.SeriesInstanceUID, dataset.StudyInstanceUID]
    assert len(set(uids)) == 3
    assert all(uid.startswith("2.25.") and uid.is_valid for uid in uids)
    write_dicom(tmp_path / "b.dcm", levels(1, 9, 9)[1], subject=SyntheticSubject(run_id="2", sample_id="000007", label="x"), marking={})
    assert pydicom.dcmread(tmp_path / "b.dcm").SOPInstanceUID not in uids


def test_a_colour_volume_is_no_dicom(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Colour volumes"):
        write_dicom(tmp_path / "a.dcm", levels(3, 4, 4, 4)[1], subject=SUBJECT, marking={})


def saved(tmp_path: Path, picture: Pillow.Image, suffix: str = ".png") -> Path:
    path = tmp_path / f"a{suffix}"
    picture.save(path)
    return path


def test_every_kind_of_png_becomes_the_channels_asked_for(tmp_path: Path) -> None:
    grey = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)
    picture = Pillow.fromarray(grey)
    for mode in ("L", "RGB", "RGBA", "LA", "P"):
        path = saved(tmp_path, picture.convert(mode))
        assert np.array_equal(read_image(path, channels=1).voxels[0], grey), mode
        assert np.array_equal(read_image(path, channels=3).voxels, np.stack([grey] * 3)), mode
    deep = saved(tmp_path, Pillow.fromarray(grey.astype(np.uint16) * 256))
    assert np.array_equal(read_image(deep, channels=1).voxels[0], grey * 256.0)
    assert read_image(saved(tmp_path, picture.convert("1", dither=Pillow.Dither.NONE)), channels=1).voxels.max() == 255


def test_what_is_transparent_counts_as_black(tmp_path: Path) -> None:
    pixels = np.full((8, 9, 4), 200, dtype=np.uint8)
    pixels[:, :4, 3], pixels[:, 4:, 3] = 0, 255
    for channels in (1, 3):
        voxels = read_image(saved(tmp_path, Pillow.fromarray(pixels)), channels=channels).voxels
        assert (voxels[:, :, :4] == 0).all()
        assert (voxels[:, :, 4:] == 200).all()


def test_colour_is_refused_when_one_channel_is_asked_for_but_traces_of_it_are_not(tmp_path: Path) -> None:
    colour = np.zeros((8, 9, 3), dtype=np.uint8)
    colour[:, :3, 0], colour[:, 3:6, 1], colour[:, 6:, 2] = 20, 20, 20
    voxels = read_image(saved(tmp_path, Pillow.fromarray(colour)), channels=1).voxels[0, 0]
    assert np.abs(voxels[[0, 3, 6]] - 20 * np.array([0.299, 0.587, 0.114])).max() < 1  # ITU-R 601
    with pytest.raises(DataError, match="channels of colour"):
        read_image(saved(tmp_path, Pillow.fromarray(colour * 10)), channels=1)


def test_jpeg_is_read_almost_as_written(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(32), np.arange(32)).astype(np.uint8) * 3
    buffer = io.BytesIO()
    Pillow.fromarray(smooth).save(buffer, format="JPEG", quality=95)
    (tmp_path / "a.jpeg").write_bytes(buffer.getvalue())
    assert np.abs(read_image(tmp_path / "a.jpeg", channels=1).voxels[0] - smooth).max() < 4
