"""Every fault of a data set ends in one DataError of one line that says what is wrong."""

from __future__ import annotations

import gzip
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image as Pillow

from dpsynth.config import DataConfig
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.errors import DataError
from dpsynth.progress import silent

Spoil = Callable[[Path], object]


def message_of(config: DataConfig) -> str:
    """Read the whole set; return the one line of its DataError."""
    with pytest.raises(DataError) as caught:
        prepare(read_cohort(config), config, progress=silent)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / "table.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def only_one_of_class(folder: Path) -> None:
    edit(folder, ",lesion,", ",normal,")
    edit(folder, "P01,normal", "P01,lesion")


def one_patient_with_all_of_a_class(folder: Path) -> None:
    for index in range(1, 24, 2):
        edit(folder, f",P{index:02d},", ",P01,")
    for index in range(0, 24, 2):  # enough others remain
        edit(folder, f",P{index:02d},normal,F", f",P{index:02d},normal,F\nb{index}.png,Q{index},normal,F")
        shutil.copy(folder / f"i{index:02d}.png", folder / f"b{index}.png")


def a_million_megapixels(folder: Path) -> None:
    content = (folder / "i03.png").read_bytes()
    header = b"IHDR" + (2**20).to_bytes(4, "big") * 2 + content[24:29]
    (folder / "i03.png").write_bytes(content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:])


def fewer_patients(folder: Path) -> None:
    for index in range(4, 24):
        edit(folder, f",P{index:02d},", f",P{index % 4:02d},")


def grey(folder: Path, *, shape: tuple[int, ...] = (12, 12), value: int = 7) -> None:
    Pillow.fromarray(np.full(shape, value, dtype=np.uint8)).save(folder / "i03.png")


def deep(folder: Path) -> None:
    Pillow.fromarray(np.linspace(0, 65535, 144).astype(np.uint16).reshape(12, 12)).save(folder / "i03.png")


RASTER: dict[str, tuple[Spoil, str]] = {
    "no table": (lambda f: (f / "table.csv").unlink(), "table.csv"),
    "a table that is not text": (lambda f: (f / "table.csv").write_bytes(b"\xff\xfe\x00,"), "UTF-8"),
    "an empty table": (lambda f: (f / "table.csv").write_text(""), "missing"),
    "a column is missing": (lambda f: edit(f, "patient_id", "patient"), "patient_id"),
    "a row without its file": (lambda f: (f / "i03.png").unlink(), "i03.png"),
    "a file without a row": (lambda f: edit(f, "i03.png,P03,lesion,F\n", ""), "i03.png"),
    "two rows for a file": (lambda f: edit(f, "i04.png", "./i03.png"), "twice"),
    "an empty patient": (lambda f: edit(f, ",P03,", ", ,"), "patient_id is empty"),
    "an empty label": (lambda f: edit(f, "P03,lesion", "P03,"), "label is empty"),
    "a label outside the list": (lambda f: edit(f, "P03,lesion", "P03,tumour"), "tumour"),
    "too few fields": (lambda f: edit(f, "P03,lesion,F", "P03"), "line 5"),
    "too many fields": (lambda f: edit(f, "P03,lesion,F", "P03,lesion,F,x"), "line 5"),
    "a path out of the folder": (lambda f: edit(f, "i03.png", "../raster/i03.png"), "inside the folder"),
    "an absolute path": (lambda f: edit(f, "i03.png", str(f / "i03.png")), "inside the folder"),
    "a name of two lines": (lambda f: edit(f, "i03.png", '"i03\n.png"'), "control characters"),
    "a name that is too long": (lambda f: edit(f, "i03.png", "x" * 5000), "no file"),
    "fewer than 20 patients": (fewer_patients, "at least 20 patients"),
    "a class with one patient": (only_one_of_class, "lesion"),
    "a class with many images of one patient": (one_patient_with_all_of_a_class, "lesion"),
    "a decompression bomb": (a_million_megapixels, "i03.png"),
    "an empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "table.csv"),
    "no folder": (shutil.rmtree, "data.path"),
    "a truncated image": (lambda f: cut(f / "i03.png"), "i03.png"),
    "an empty image file": (lambda f: (f / "i03.png").write_bytes(b""), "i03.png"),
    "another format under the name": (lambda f: Pillow.new("L", (9, 9)).save(f / "i03.png", format="BMP"), "i03.png"),
    "a constant image": (grey, "constant"),
    "a deep image among the others": (deep, "half of it lies above"),
    "a strip": (lambda f: Pillow.fromarray(np.arange(600, dtype=np.uint8)[None]).save(f / "i03.png"), "50 times"),
}


@pytest.mark.parametrize("fault", RASTER)
def test_a_faulty_raster_folder_is_refused(raster: tuple[Path, DataConfig], fault: str) -> None:
    folder, config = raster
    spoil, expected = RASTER[fault]
    spoil(folder)
    assert expected in message_of(config)


def resave(path: Path, **changes: object) -> None:
    with np.load(path) as arrays:
        content = {**arrays, **changes}
    np.savez(path, **{key: value for key, value in content.items() if value is not None})


def bare_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.ones(3))


MEDMNIST: dict[str, tuple[Spoil, str]] = {
    "no labels": (lambda f: resave(f, train_labels=None), "train_labels"),
    "text instead of pixels": (lambda f: resave(f, train_images=np.full((24, 12, 12), "x")), "dtype"),
    "complex pixels": (lambda f: resave(f, train_images=np.ones((24, 12, 12), dtype=np.complex64)), "dtype"),
    "pickled objects": (lambda f: resave(f, train_images=np.full(24, None)), "unreadable"),
    "volumes for pictures": (
        lambda f: resave(f, train_images=np.zeros((24, 4, 12, 12), dtype=np.uint8)),
        "2 spatial dimensions",
    ),
    "one number for all images": (lambda f: resave(f, train_images=np.uint8(3)), "shape ()"),
    "one number for all labels": (lambda f: resave(f, train_labels=np.uint8(1)), "shape ()"),
    "no label at all": (lambda f: resave(f, train_labels=np.empty((0, 1), dtype=np.uint8)), "shape (0, 1)"),
    "several labels an image": (lambda f: resave(f, train_labels=np.zeros((24, 2), dtype=np.uint8)), "shape (24, 2)"),
    "fractional labels": (lambda f: resave(f, train_labels=np.zeros((24, 1))), "whole-number"),
    "a label without a name": (lambda f: resave(f, train_labels=np.full((24, 1), 5)), "there are: '5'"),
    "a negative label": (lambda f: resave(f, train_labels=np.full((24, 1), -2)), "there are: '-2'"),
    "no images": (lambda f: resave(f, train_images=np.empty((0, 12, 12)), train_labels=np.empty((0, 1), dtype=int)), "none"),
    "NaN": (lambda f: resave(f, train_images=np.where(np.eye(12) > 0, np.nan, np.ones((24, 12, 12)))), "NaN"),
    "infinity": (lambda f: resave(f, train_images=np.where(np.eye(12) > 0, np.inf, np.ones((24, 12, 12)))), "infinite"),
    "colour for grey": (lambda f: resave(f, train_images=np.random.default_rng(0).random((24, 12, 12, 3))), "channels"),
    "a truncated archive": (cut, "set.npz"),
    "an array instead of an archive": (bare_array, "set.npz"),
    "a text file": (lambda f: f.write_text("hello"), "set.npz"),
    "a folder": (lambda f: (f.unlink(), f.mkdir()), "set.npz"),
    "no file": (lambda f: f.unlink(), "data.path"),
}


@pytest.mark.parametrize("fault", MEDMNIST)
def test_a_faulty_npz_is_refused(medmnist: tuple[Path, DataConfig], fault: str) -> None:
    path, config = medmnist
    spoil, expected = MEDMNIST[fault]
    spoil(path)
    assert expected in message_of(config)


def volume(folder: Path, voxels: np.ndarray) -> None:
    nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(folder / "i03.nii.gz")


def no_axes(folder: Path) -> None:
    file = nibabel.Nifti1Image(RAMP, None)
    file.header["sform_code"], file.header["qform_code"] = 1, 0
    for row in ("srow_x", "srow_y", "srow_z"):
        file.header[row] = 0
    (folder / "i03.nii.gz").write_bytes(gzip.compress(file.to_bytes()))


RAMP = np.arange(512, dtype=np.float32).reshape(8, 8, 8)
NIFTI: dict[str, tuple[Spoil, str]] = {
    "NaN": (lambda f: volume(f, np.where(RAMP > 500, np.nan, RAMP)), "NaN"),
    "a series in one file": (lambda f: volume(f, np.stack([RAMP] * 3, axis=-1)), "3 dimensions"),
    "a single slice among volumes": (lambda f: volume(f, RAMP[..., :1]), "3 spatial dimensions"),
    "complex voxels": (lambda f: volume(f, RAMP.astype(np.complex64)), "real numbers"),
    "a constant volume": (lambda f: volume(f, np.ones((8, 8, 8), dtype=np.float32)), "constant"),
    "truncated": (lambda f: cut(f / "i03.nii.gz"), "i03.nii.gz"),
    "gzip of something else": (lambda f: (f / "i03.nii.gz").write_bytes(gzip.compress(b"hello")), "i03.nii.gz"),
    "not compressed at all": (lambda f: (f / "i03.nii.gz").write_bytes(b"hello"), "i03.nii.gz"),
    "no axes": (no_axes, "i03.nii.gz"),
    "no table": (lambda f: (f / "table.csv").unlink(), "table.csv"),
    "a wrong label": (lambda f: edit(f, "P03,lesion", "P03,tumour"), "tumour"),
}


@pytest.mark.parametrize("fault", NIFTI)
def test_a_faulty_nifti_folder_is_refused(nifti: tuple[Path, DataConfig], fault: str) -> None:
    folder, config = nifti
    spoil, expected = NIFTI[fault]
    spoil(folder)
    assert expected in message_of(config)


def change(folder: Path, **elements: object) -> None:
    dataset = pydicom.dcmread(folder / "i03.dcm")
    for keyword, value in elements.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(folder / "i03.dcm")


def labels(folder: Path, *rows: str) -> None:
    (folder / "table.csv").write_text("\n".join(["patient_id,SeriesDescription", *rows]) + "\n")


def damage(folder: Path, old: bytes, new: bytes) -> None:
    content = (folder / "i03.dcm").read_bytes()
    assert content.count(old) == 1
    (folder / "i03.dcm").write_bytes(content.replace(old, new))


def eight_frames(folder: Path) -> None:
    change(folder, NumberOfFrames=8, PixelData=bytes(range(144)) * 8)


DICOM: dict[str, tuple[Spoil, str]] = {
    "no patient": (lambda f: change(f, PatientID=None), "PatientID"),
    "an empty patient": (lambda f: change(f, PatientID=""), "PatientID"),
    "no label": (lambda f: change(f, SeriesDescription=None), "SeriesDescription"),
    "an unknown label": (lambda f: change(f, SeriesDescription="tumour"), "tumour"),
    "a patient of no known type": (lambda f: damage(f, b"\x10\0\x20\0LO", b"\x10\0\x20\0L\xff"), "PatientID"),
    "a character set of no known type": (lambda f: damage(f, b"\x08\0\x05\0CS", b"\x08\0\x05\0C\xff"), "i03.dcm"),
    "not DICOM": (lambda f: (f / "i03.dcm").write_text("hello"), "i03.dcm"),
    "truncated pixels": (lambda f: change(f, PixelData=b"\0\0"), "pixel data"),
    "a truncated file": (lambda f: (f / "i03.dcm").write_bytes((f / "i03.dcm").read_bytes()[:-60]), "i03.dcm"),
    "no pixels": (lambda f: change(f, PixelData=None), "pixel data"),
    "several frames": (eight_frames, "8"),
    "one image of two patients": (
        lambda f: (shutil.copy(f / "i03.dcm", f / "copy.dcm"), change(f, PatientID="X")),
        "SOPInstanceUID",
    ),
    "one identity for two pictures": (
        lambda f: (shutil.copy(f / "i03.dcm", f / "copy.dcm"), change(f, PixelData=bytes(range(144)))),
        "SOPInstanceUID",
    ),
    "a table without its rows": (lambda f: labels(f, "SYN-00,normal"), "no row"),
    "a table of other patients": (
        lambda f: labels(f, "X,normal", *(f"SYN-{i:02d},normal" for i in range(24))),
        "the first is X",
    ),
    "a table without labels": (lambda f: (f / "table.csv").write_text("patient_id\n"), "SeriesDescription"),
    "an empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "data.path"),
}


@pytest.mark.parametrize("fault", DICOM)
def test_a_faulty_dicom_folder_is_refused(dicom: tuple[Path, DataConfig], fault: str) -> None:
    folder, config = dicom
    spoil, expected = DICOM[fault]
    spoil(folder)
    assert expected in message_of(config)


@pytest.mark.parametrize("source", ["raster", "medmnist", "nifti", "dicom"])
def test_the_unspoilt_folder_is_read(request: pytest.FixtureRequest, source: str) -> None:
    _, config = request.getfixturevalue(source)
    images = prepare(read_cohort(config), config, progress=silent)
    assert images.images.shape == (24, 1, *config.spatial_shape)
    assert images.images.dtype == np.float32
    assert np.abs(images.images).max() <= 1
    assert images.num_patients == 24
    assert images.labels.tolist() == [0, 1] * 12 or source == "medmnist"
