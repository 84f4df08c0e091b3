"""Nothing rides along with the images: every file name and every field of every format of a release is one that was meant to be there.

It is read back from the files as they lie, after they were written and before they are signed, so a library that adds a field of its own
(a software path, a time, a user's name) stops the release instead of leaving with it.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import nibabel
import pydicom

from dpsynth.errors import GateRefused

ALWAYS = ("synthetic.npz", "labels.csv", "guarantee.json", "verdicts.json", "report.html", "DISCLOSURE.txt", "README.md")
_NAMES = (*ALWAYS, "detector.json", "federation.json")
_SITE_NAME = re.compile(r"sites/[a-z0-9][a-z0-9-]{0,39}\.(dsse\.json|pub)")
_IMAGE_NAME = re.compile(r"images/synthetic-\d{6}\.(png|nii\.gz|dcm)")
_ARRAYS = {f"{split}_{part}" for split in ("train", "val", "test") for part in ("images", "labels")} | {"synthetic", "provenance"}
_PNG_SIGNATURE, _PNG_CHUNKS = b"\x89PNG\r\n\x1a\n", {"IHDR", "IDAT", "IEND", "iTXt"}
_MARKS = {"Synthetic", "Disclosure", "Software", "Release", "Sample", "Label", "Attributes", "Privacy"}
_NIFTI_TEXTS = {
    "descrip": b"SYNTHETIC AI-GENERATED, not for diagnostic use",
    "intent_name": b"synthetic",
    "aux_file": b"SYNTHETIC",
    "db_name": b"",
}
_COMMENT = 6
_DICOM_NAMES = {"PatientName": re.compile(r"SYNTHETIC\^\d+"), "PatientID": re.compile(r"SYN-\d+")}
_DICOM_EMPTY = ("PatientBirthDate", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID")
_DICOM_KEYWORDS = {
    *_DICOM_NAMES, *_DICOM_EMPTY, "SpecificCharacterSet", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID",
    "SOPClassUID", "Modality",
    "ConversionType", "Manufacturer", "ManufacturerModelName", "SoftwareVersions", "SecondaryCaptureDeviceManufacturer", "PatientSex",
    "PatientAge", "SeriesDescription", "SeriesNumber", "InstanceNumber", "PatientOrientation", "Laterality", "SyntheticData", "ImageType",
    "ContentQualification", "QualityControlSubject", "BurnedInAnnotation", "LossyImageCompression", "PatientIdentityRemoved",
    "DeidentificationMethod", "ImageComments", "DerivationDescription", "ContributingEquipmentSequence",
    "Rows", "Columns", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PlanarConfiguration", "NumberOfFrames",
    "FrameIncrementPointer", "PageNumberVector", "PresentationLUTShape", "RescaleType", "RescaleIntercept", "RescaleSlope", "PixelData",
}  # fmt: skip


def require_expected_metadata(folder: Path, attributes: Iterable[str]) -> None:
    """Raise GateRefused that names the first file with a name or field that no part of a release has. attributes: names of conditions."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        problem = unexpected_in(path, name, {f"train_{attribute}" for attribute in attributes})
        if problem:
            raise GateRefused(f"The release would carry more than it should: {name}: {problem}. This is a fault of dpsynth; report it.")


def unexpected_in(path: Path, name: str, attribute_arrays: set[str]) -> str:
    """What a file of a release has that none is written with; empty when there is no such thing."""
    if name == "synthetic.npz":
        with zipfile.ZipFile(path) as archive:
            known, found = {f"{array}.npy" for array in _ARRAYS | attribute_arrays}, archive.namelist()
            twice = "an array twice" if len(found) > len(set(found)) else ""
            return _unknown("arrays", set(found) - known) or twice or ("a comment" if archive.comment else "")
    if name in _NAMES or _SITE_NAME.fullmatch(name):
        return ""
    if not _IMAGE_NAME.fullmatch(name):
        return "an unexpected file name"
    return {".png": _png, ".gz": _nifti, ".dcm": _dicom}[path.suffix](path)


def _unknown(what: str, names: set[str]) -> str:
    return f"unexpected {what} {', '.join(sorted(names))}" if names else ""


def _png(path: Path) -> str:
    """Chunks as they lie in the file: a decoder shows only those that it knows."""
    content, position, chunks, keys = path.read_bytes(), len(_PNG_SIGNATURE), set(), set()
    while position < len(content):
        length, kind = int.from_bytes(content[position : position + 4], "big"), content[position + 4 : position + 8].decode("latin-1")
        if kind == "iTXt":
            keys.add(content[position + 8 : position + 8 + length].split(b"\0", 1)[0].decode("latin-1"))
        chunks.add(kind)
        position += length + 12
        if kind == "IEND" and position < len(content):
            return "bytes behind the end"
    return _unknown("chunks", chunks - _PNG_CHUNKS) or _unknown("texts", keys - _MARKS)


def _nifti(path: Path) -> str:
    header = nibabel.Nifti1Image.from_filename(path).header
    texts = {name for name, value in _NIFTI_TEXTS.items() if bytes(header[name].item()).rstrip(b"\0") != value}
    return _unknown("text in", texts) or ("" if [e.get_code() for e in header.extensions] == [_COMMENT] else "unexpected extensions")


def _dicom(path: Path) -> str:
    dataset = pydicom.dcmread(path)
    odd = {str(element.tag) if element.tag.is_private else element.keyword for element in dataset} - _DICOM_KEYWORDS
    odd |= {name for name, form in _DICOM_NAMES.items() if not form.fullmatch(str(dataset.get(name, "")))}
    odd |= {name for name in _DICOM_EMPTY if str(dataset.get(name, ""))}
    return _unknown("elements", odd)
