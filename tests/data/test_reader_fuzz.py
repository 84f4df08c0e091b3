"""No content of a file makes a reader fail in another way than DataError, in one line."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpsynth.data.dicom import read_dicom
from dpsynth.data.medmnist import read_medmnist
from dpsynth.data.nifti import read_volume
from dpsynth.data.raster import read_image
from dpsynth.data.source import read_cohort
from dpsynth.data.table import read_table
from dpsynth.errors import DataError
from dpsynth.privacy.unit import PrivacyUnit

fuzzed = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# Where to put which bytes into a valid file; positions count from its front or its back, where the structure is.
mutations = st.lists(st.tuples(st.integers(-700, 1500), st.binary(min_size=1, max_size=6)), max_size=6)


def mutated(valid: bytes, changes: list[tuple[int, bytes]], keep: int) -> bytes:
    content = bytearray(valid)
    for position, value in changes:
        at = position % len(content)
        content[at : at + len(value)] = value
    return bytes(content[: len(content) - keep % len(content)])


def only_data_errors(read: Callable[[], object]) -> None:
    message = ""
    try:
        read()
    except DataError as error:
        message = str(error)
    assert "\n" not in message


@fuzzed
@given(changes=mutations, keep=st.one_of(st.just(0), st.integers(0, 4000)))
def test_a_mutated_npz(medmnist: tuple[Path, object], changes: list[tuple[int, bytes]], keep: int) -> None:
    path, _ = medmnist
    other = path.with_name("fuzz.npz")
    other.write_bytes(mutated(path.read_bytes(), changes, keep))

    def read() -> None:
        for record in read_medmnist(other, name="x", split="train", classes=("a", "b"), dimensions=2).records:
            record.read()

    only_data_errors(read)


@fuzzed
@given(header=st.text(max_size=200), version=st.sampled_from([(1, 0), (2, 0), (3, 0)]))
def test_any_array_header_inside_an_npz(medmnist: tuple[Path, object], header: str, version: tuple[int, int]) -> None:
    import zipfile

    text = header.encode("utf-8")
    size = len(text).to_bytes(2 if version == (1, 0) else 4, "little")
    other = medmnist[0].with_name("fuzz.npz")
    with zipfile.ZipFile(other, "w") as archive:
        for name in ("train_images", "train_labels"):
            archive.writestr(f"{name}.npy", b"\x93NUMPY" + bytes(version) + size + text + bytes(50))
    only_data_errors(lambda: read_medmnist(other, name="x", split="train", classes=("a", "b"), dimensions=2))


@fuzzed
@given(content=st.one_of(st.binary(max_size=300), st.text(alphabet='file,patient_idlabel\n"./\\\x00 i03png', max_size=200).map(str.encode)))
def test_any_table(raster: tuple[Path, object], content: bytes) -> None:
    folder, _ = raster
    header = b"file,patient_id,label\n"
    for text in (content, header + content):
        (folder / "table.csv").write_bytes(text)
        only_data_errors(lambda: read_table(folder, label_column="label", suffixes=(".png",)))


@fuzzed
@given(content=st.binary(max_size=300))
def test_any_table_beside_dicom(dicom: tuple[Path, object], content: bytes) -> None:
    folder, _ = dicom
    for header in (b"", b"file,patient_id,label\n", b"patient_id,label\n"):
        (folder / "table.csv").write_bytes(header + content)
        only_data_errors(lambda: read_dicom(folder, name="x", unit=PrivacyUnit.PATIENT, classes=("a",), label_column="label", dimensions=2))


@fuzzed
@given(changes=mutations, keep=st.one_of(st.just(0), st.integers(0, 4000)))
def test_a_mutated_png(raster: tuple[Path, object], changes: list[tuple[int, bytes]], keep: int) -> None:
    path = raster[0] / "i03.png"
    other = raster[0] / "fuzz.png"
    other.write_bytes(mutated(path.read_bytes(), changes, keep))
    only_data_errors(lambda: read_image(other, channels=1))


@fuzzed
@given(changes=mutations, keep=st.one_of(st.just(0), st.integers(0, 1500)), compress=st.booleans())
def test_a_mutated_nifti(nifti: tuple[Path, object], changes: list[tuple[int, bytes]], keep: int, compress: bool) -> None:
    valid = gzip.decompress((nifti[0] / "i03.nii.gz").read_bytes())
    content = mutated(valid, changes, keep)
    other = nifti[0] / ("fuzz.nii.gz" if compress else "fuzz.nii")
    other.write_bytes(gzip.compress(content) if compress else content)
    only_data_errors(lambda: read_volume(other))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_mutated_dicom(dicom: tuple[Path, object], dimensions: int) -> None:
    folder, _ = dicom
    valid = (folder / "i03.dcm").read_bytes()
    for path in folder.iterdir():
        path.unlink()
    classes = ("normal", "lesion")

    def read() -> None:
        cohort = read_dicom(
            folder, name="x", unit=PrivacyUnit.PATIENT, classes=classes, label_column="SeriesDescription", dimensions=dimensions
        )
        for record in cohort.records:
            record.read()

    @settings(fuzzed, max_examples=120)
    @given(changes=mutations, keep=st.one_of(st.just(0), st.integers(0, 1500)))
    def run(changes: list[tuple[int, bytes]], keep: int) -> None:
        (folder / "fuzz.dcm").write_bytes(mutated(valid, changes, keep))
        only_data_errors(read)

    run()


@fuzzed
@given(content=st.binary(max_size=400))
def test_any_bytes_as_any_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    for name, read in (
        ("any.npz", lambda p: read_medmnist(p, name="x", split="train", classes=("a",), dimensions=2)),
        ("any.png", lambda p: read_image(p, channels=1)),
        ("any.nii", read_volume),
    ):
        (folder / name).write_bytes(content)
        only_data_errors(lambda read=read, name=name: read(folder / name))


def test_an_archive_that_claims_a_huge_array_is_refused(medmnist: tuple[Path, object]) -> None:
    import zipfile

    path, config = medmnist
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (2**50, 28, 28)})
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("train_images", "train_labels"):
            archive.writestr(f"{name}.npy", b"" + buffer.getvalue())
    with pytest.raises(DataError, match=r"set\.npz"):
        read_cohort(config)  # type: ignore[arg-type]
