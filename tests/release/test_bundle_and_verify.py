"""What leaves, and that every change to it is named by verification without torch."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image, PngImagePlugin

from dpsynth.artifacts import read_json, sha256_file, write_json
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import ReleaseConfig
from dpsynth.data.candidates import Candidates
from dpsynth.errors import ArtifactError, GateRefused, SignatureError
from dpsynth.privacy.accountant import account
from dpsynth.privacy.guarantee import Guarantee
from dpsynth.privacy.mechanism import GaussianQuery, MomentRelease
from dpsynth.privacy.unit import PrivacyUnit
from dpsynth.progress import silent
from dpsynth.release.bundle import Release, release_files, write_release
from dpsynth.release.gate import Allowed
from dpsynth.release.metadata import require_expected_metadata
from dpsynth.release.verify import verified, verify
from dpsynth.signing import generate_key, key_id, load_private, load_public, sign_statement, verify_envelope

RELEASE = MomentRelease(noise_multiplier=1.0, queries=(GaussianQuery(name="a", share=1.0, clip_norm=1.0),))
SECRET = "MRN-4711 /data/hospital/secret.png"


def package(spatial: tuple[int, ...] = (8, 8), formats: tuple[str, ...] = ("png", "nifti", "dicom")) -> Release:
    rng = np.random.default_rng(0)
    candidates = Candidates(
        images=rng.integers(0, 256, (4, 1, *spatial), dtype=np.uint8),
        labels=np.array([0, 1, 1, 0]),
        seeds=np.arange(4, dtype=np.uint64),
    )
    accounting = account([RELEASE], 1e-5, second_opinion=lambda mechanisms, delta: account(mechanisms, delta, second_opinion=None).pld)
    guarantee = Guarantee(
        data_name="clinic",
        unit=PrivacyUnit.PATIENT,
        declared_patients=500,
        mechanisms=(RELEASE,),
        accounting=accounting,
        ledger_epsilon=accounting.pld,
        max_images_per_patient=8,
        unprotected=("the list of classes",),
    )
    verdict = Verdict(
        check="copying",
        question="?",
        outcome=Outcome.PASS,
        statistic_name="s",
        statistic=0.123456,
        interval=(0.0, 0.654321),
        threshold=1.0,
        confidence_level=0.95,
        false_alarm_rate=0.01,
        reason=SECRET,
        limitation="much",
        figures={SECRET: 77.7},
    )
    return Release(
        allowed=Allowed(candidates_sha256="c"),
        release_id="ab12",
        candidates=candidates,
        candidates_sha256="c",
        classes=("normal", "lesion"),
        guarantee=guarantee,
        verdicts=(verdict,),
        required=("copying",),
        reviews={},
        method="diffusion",
        report_html="<p>report</p>",
        ledger_head=(5, "f" * 64),
        settings=ReleaseConfig(formats=formats),  # type: ignore[arg-type]
    )


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    generate_key(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def out(tmp_path: Path, keys: Path) -> Path:
    return write_release(package(), out=tmp_path / "out", private=load_private(keys / "signing.key"), progress=silent)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_fresh_release_verifies_and_is_complete(out: Path, keys: Path) -> None:
    assert verify(out, keys / "signing.pub") == []
    names = {path.relative_to(out).as_posix() for path in files(out)}
    assert {
        "synthetic.npz",
        "labels.csv",
        "guarantee.json",
        "verdicts.json",
        "report.html",
        "README.md",
        "DISCLOSURE.txt",
    } <= names
    for suffix in (".png", ".nii.gz", ".dcm"):
        assert sum(name.endswith(suffix) for name in names) == 4


def test_volumes_are_released_as_nifti_and_dicom(tmp_path: Path, keys: Path) -> None:
    volumes = package(spatial=(8, 8, 8), formats=("nifti", "dicom"))
    folder = write_release(volumes, out=tmp_path / "volumes", private=load_private(keys / "signing.key"), progress=silent)
    assert verify(folder, keys / "signing.pub") == []


def test_every_flipped_bit_is_named(out: Path, keys: Path) -> None:
    for path in files(out):
        content = path.read_bytes()
        for position in (0, len(content) // 2, len(content) - 1):
            changed = bytearray(content)
            changed[position] ^= 4
            path.write_bytes(bytes(changed))
            problems = verify(out, keys / "signing.pub")
            assert any(path.name in problem for problem in problems), (path.name, position, problems)
        path.write_bytes(content)
    assert verify(out, keys / "signing.pub") == []


def test_every_single_bit_of_the_signature_is_covered(out: Path, keys: Path) -> None:
    """Also those that base64 or JSON would read over: padding bits, the key's name, spaces."""
    path = out / "manifest.dsse.json"
    content = path.read_bytes()
    start = content.index(b'"signatures"')
    for position in (*range(start, len(content)), *range(0, start, 97)):
        for bit in range(8):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            path.write_bytes(bytes(changed))
            assert any("manifest.dsse.json" in problem for problem in verify(out, keys / "signing.pub")), (position, bit)
    path.write_bytes(content)
    path.write_bytes(json.dumps(json.loads(content)).encode())
    assert verify(out, keys / "signing.pub")


def test_every_removed_or_renamed_file_is_named(out: Path, keys: Path) -> None:
    for path in files(out):
        moved = path.with_name("zz" + path.name)
        path.rename(moved)
        problems = verify(out, keys / "signing.pub")
        assert any(problem.startswith(path.relative_to(out).as_posix()) or path.name in problem for problem in problems)
        moved.rename(path)


@pytest.mark.parametrize("name", ["extra.txt", "images/extra.png", ".hidden", "images/deeper/x"])
def test_an_added_file_is_named(out: Path, keys: Path, name: str) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("x")
    assert any(name in problem for problem in verify(out, keys / "signing.pub"))


def test_a_link_is_named_even_when_its_content_is_right(out: Path, keys: Path, tmp_path: Path) -> None:
    target = out / "labels.csv"
    (tmp_path / "elsewhere").write_bytes(target.read_bytes())
    target.unlink()
    target.symlink_to(tmp_path / "elsewhere")
    assert any("labels.csv" in problem for problem in verify(out, keys / "signing.pub"))


def test_a_wrong_key_is_named(out: Path, tmp_path: Path) -> None:
    generate_key(tmp_path / "others")
    assert "signature" in verify(out, tmp_path / "others" / "signing.pub")[0]
    with pytest.raises(SignatureError):
        verify(out, out / "labels.csv")


def test_a_manifest_made_anew_by_someone_else_is_named(out: Path, keys: Path) -> None:
    """Changing a file and the manifest alike does not help without the key."""
    (out / "labels.csv").write_text("index,label\n")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["labels.csv"]["sha256"] = sha256_file(out / "labels.csv")
    (out / "manifest.json").write_text(json.dumps(manifest))
    problems = verify(out, keys / "signing.pub")
    assert any("labels.csv" in problem for problem in problems)
    assert any("manifest.json" in problem for problem in problems)


def test_a_signed_lie_about_epsilon_is_found(tmp_path: Path, keys: Path) -> None:
    lie = package()
    small = replace(lie.guarantee.accounting, pld=0.5, rdp=0.6, second_opinion=0.5)
    lie = replace(lie, guarantee=replace(lie.guarantee, accounting=small, ledger_epsilon=0.5))
    folder = write_release(lie, out=tmp_path / "lie", private=load_private(keys / "signing.key"), progress=silent)
    assert any("not the" in problem for problem in verify(folder, keys / "signing.pub"))


def resigned(out: Path, keys: Path, **predicate: Any) -> None:
    """The site signs whatever lies in a folder now, and `predicate` of it."""
    private = load_private(keys / "signing.key")
    statement = verify_envelope(read_json(out / "manifest.dsse.json"), private.public_key())
    names = ["manifest.json", *release_files(out)]
    statement["subject"] = [{"name": name, "digest": {"sha256": sha256_file(out / name)}} for name in names]
    statement["predicate"] |= predicate
    write_json(out / "manifest.dsse.json", sign_statement(statement, private))


@pytest.mark.parametrize("suffix", ["png", "nii.gz", "dcm"])
def test_a_picture_of_another_image_is_found_in_every_format_though_it_is_signed(
    out: Path, keys: Path, tmp_path: Path, suffix: str
) -> None:
    other = package()
    images = other.candidates.images.copy()
    images[2, 0, 3, 3] ^= 1
    changed = replace(other, candidates=replace(other.candidates, images=images))
    folder = write_release(changed, out=tmp_path / "other", private=load_private(keys / "signing.key"), progress=silent)
    name = f"images/synthetic-000002.{suffix}"
    (out / name).write_bytes((folder / name).read_bytes())
    resigned(out, keys)
    assert verify(out, keys / "signing.pub") == [f"{name}: it is not image 2 of synthetic.npz, or does not say what it is"]


@pytest.mark.parametrize("name", ["images/synthetic-000004.png", "notes.txt", "sites/north.pub", "federation.json"])
def test_a_file_that_no_release_has_is_found_though_it_is_signed(out: Path, keys: Path, name: str) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(b"x")
    resigned(out, keys)
    assert any(name in problem or problem.startswith("sites") for problem in verify(out, keys / "signing.pub"))


def _less_private(path: Path) -> None:
    with Image.open(path) as picture:
        marks = PngImagePlugin.PngInfo()
        for key, text in picture.text.items():  # type: ignore[attr-defined]
            marks.add_itxt(key, "epsilon 0.01" if key == "Privacy" else text)
        picture.save(path, pnginfo=marks)


def _array_twice(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        content = archive.read("train_images.npy")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train_images.npy", content)


@pytest.mark.parametrize(
    ("name", "fault", "words"),
    [
        ("images/synthetic-000001.png", _less_private, "it is not image 1 of synthetic.npz, or does not say what it is"),
        ("synthetic.npz", _array_twice, "an array twice"),
    ],
)
def test_a_lie_about_the_images_is_found_though_it_is_signed(
    out: Path, keys: Path, name: str, fault: Callable[[Path], None], words: str
) -> None:
    fault(out / name)
    resigned(out, keys)
    assert verify(out, keys / "signing.pub") == [f"{name}: {words}"]


def test_two_classes_under_one_name_are_found_though_it_is_signed(tmp_path: Path, keys: Path) -> None:
    """Without pictures, which say their label, the table alone could hide which images are of patients with a finding."""
    folder = write_release(package(formats=()), out=tmp_path / "out", private=load_private(keys / "signing.key"), progress=silent)
    assert verify(folder, keys / "signing.pub") == []
    (folder / "labels.csv").write_text((folder / "labels.csv").read_text().replace("lesion", "normal"))
    resigned(folder, keys)
    assert verify(folder, keys / "signing.pub") == ["labels.csv: it is not the table of the images in synthetic.npz"]


def test_another_number_of_images_than_there_are_is_found_though_it_is_signed(out: Path, keys: Path) -> None:
    resigned(out, keys, images=5)
    assert verify(out, keys / "signing.pub") == ["synthetic.npz: it holds 4 images, and 5 were signed"]


def test_nothing_private_leaves(out: Path) -> None:
    for path in files(out):
        content = path.read_bytes()
        for secret in (SECRET.encode(), b"MRN-4711", b"0.123456", b"0.654321", b"77.7", str(out.parent).encode()):
            assert secret not in content, (path.name, secret)


def test_only_the_candidates_that_the_gate_saw_can_leave(tmp_path: Path) -> None:
    with pytest.raises(GateRefused, match="other images"):
        replace(package(), candidates_sha256="d")


def test_an_existing_folder_is_left_alone(out: Path, keys: Path) -> None:
    before = {path: path.read_bytes() for path in files(out)}
    with pytest.raises(ArtifactError, match="not to exist"):
        write_release(package(), out=out, private=load_private(keys / "signing.key"), progress=silent)
    assert {path: path.read_bytes() for path in files(out)} == before


def test_a_failure_leaves_nothing_half_written(tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpsynth.release.bundle.sign_statement", lambda *_: (_ for _ in ()).throw(RuntimeError("stopped")))
    with pytest.raises(RuntimeError):
        write_release(package(), out=tmp_path / "broken", private=load_private(keys / "signing.key"), progress=silent)
    assert sorted(os.listdir(tmp_path)) == ["keys"]  # noqa: PTH208


def test_equal_releases_have_equal_files(out: Path, tmp_path: Path, keys: Path) -> None:
    second = write_release(package(), out=tmp_path / "second", private=load_private(keys / "signing.key"), progress=silent)
    for path in files(out):
        assert path.read_bytes() == (second / path.relative_to(out)).read_bytes(), path.name


def test_verification_runs_without_torch(out: Path, keys: Path, without_torch: Callable[[str], subprocess.CompletedProcess[str]]) -> None:
    arguments = ["dpsynth", "verify", str(out), "--key", str(keys / "signing.pub")]
    result = without_torch(f"sys.argv = {arguments!r}\nfrom dpsynth.cli import main\nmain()")
    assert result.returncode == 0, result.stderr
    *lines, word = result.stdout.splitlines()
    assert word == "true"
    assert lines == verified(out, keys / "signing.pub")


def test_what_was_verified_is_said(out: Path, keys: Path) -> None:
    """Title and number of the release, which key by its id, the digest of the manifest, how many files, which epsilon."""
    release, signature, present, guarantee, images = verified(out, keys / "signing.pub")
    assert all(word in release for word in ("'Synthetic medical images'", "ab12", "4 synthetic images"))
    assert str(keys / "signing.pub") in signature
    assert key_id(load_public(keys / "signing.pub"))[:16] in signature
    assert hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest() in signature
    assert f"{len(files(out)) - 1} are there" in present  # all but the signature itself
    assert "delta 1e-05, patient level" in guarantee
    assert "report.html and verdicts.json say beyond these lines is the signer's word" in images


def _png_with_exif(path: Path) -> None:
    with Image.open(path) as picture:
        exif = picture.getexif()
        exif[0x013B] = "Dr. Grey"
        picture.save(path, exif=exif)


def _png_with_text(path: Path) -> None:
    marks = PngImagePlugin.PngInfo()
    marks.add_itxt("Source", "/data/hospital/secret.png")
    with Image.open(path) as picture:
        picture.save(path, pnginfo=marks)


def _png_with_a_tail(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"MRN-4711")


def _nifti_with_description(path: Path) -> None:
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
    image.header["descrip"] = b"FSL 6.0, /home/grey"
    path.write_bytes(gzip.compress(image.to_bytes()))


def _dicom_with(keyword: str, value: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        dataset = pydicom.dcmread(path)
        setattr(dataset, keyword, value)
        dataset.save_as(path)

    return change


def _dicom_with_a_private_tag(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    dataset.private_block(0x11, "HOSPITAL", create=True).add_new(0x01, "LO", "MRN-4711")
    dataset.save_as(path)


RIDERS = {
    "exif": ("images/synthetic-000000.png", _png_with_exif),
    "text": ("images/synthetic-000000.png", _png_with_text),
    "tail": ("images/synthetic-000001.png", _png_with_a_tail),
    "nifti": ("images/synthetic-000002.nii.gz", _nifti_with_description),
    "institution": ("images/synthetic-000000.dcm", _dicom_with("InstitutionName", "St. Elsewhere")),
    "a real name": ("images/synthetic-000000.dcm", _dicom_with("PatientName", "DOE^JOHN")),
    "a birth date": ("images/synthetic-000000.dcm", _dicom_with("PatientBirthDate", "19500101")),
    "private tag": ("images/synthetic-000003.dcm", _dicom_with_a_private_tag),
}


@pytest.mark.parametrize("rider", RIDERS)
def test_metadata_that_ride_along_stop_the_release_and_are_found_though_they_are_signed(rider: str, out: Path, keys: Path) -> None:
    name, change = RIDERS[rider]
    kept = (out / name).read_bytes()
    change(out / name)
    resigned(out, keys)
    assert [problem for problem in verify(out, keys / "signing.pub") if not problem.startswith(name)] == []
    assert verify(out, keys / "signing.pub") != []
    (out / name).write_bytes(kept)
    for signed in ("manifest.json", "manifest.dsse.json"):
        (out / signed).unlink()
    require_expected_metadata(out, ())
    change(out / name)
    with pytest.raises(GateRefused, match=name.rpartition("/")[2]):
        require_expected_metadata(out, ())


@pytest.mark.parametrize("name", ["images/DOE-JOHN.png", "notes.txt", "images/synthetic-000000.jpg"])
def test_a_file_that_no_release_has_stops_it(name: str, out: Path) -> None:
    (out / name).write_bytes(b"x")
    for signed in ("manifest.json", "manifest.dsse.json"):
        (out / signed).unlink()
    with pytest.raises(GateRefused, match="file name"):
        require_expected_metadata(out, ())
