"""Synthetic images as DICOM objects that say so in every place where a reader may look."""

from __future__ import annotations

import hashlib
import hmac
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
)

from dpsynth import __version__
from dpsynth.artifacts import write_bytes
from dpsynth.data.candidates import to_8_bit
from dpsynth.data.cohort import Float32
from dpsynth.errors import DataError

_PAGES = Tag(0x0018, 0x2001)  # Page Number Vector
_OF_A_VERSION = ("SoftwareVersions", "ContributingEquipmentSequence")


@dataclass(frozen=True, kw_only=True)
class SyntheticSubject:
    """Who is drawn: nobody. `sex` and `age_years` are those that the image was conditioned on, else empty."""

    run_id: str
    sample_id: str
    label: str
    sex: str = ""
    age_years: int | None = None


def write_dicom(path: Path, image: Float32, *, subject: SyntheticSubject, marking: Mapping[str, str]) -> None:
    """Write one synthetic image (channel, *space) in [-1, 1] as 8-bit Secondary Capture; equal input gives equal bytes.

    A volume becomes frames along its first axis. Synthetic Data (0008,001C) is YES; UIDs are 2.25 numbers derived from the run
    and the sample, so a second export has equal ones and none belongs to a real object. `marking` goes into
    DerivationDescription, the label into SeriesDescription. Raises DataError for a colour volume, StorageError.
    """
    write_bytes(path, _content(image, subject, marking))


def is_dicom_of(path: Path, image: Float32, *, subject: SyntheticSubject, marking: Mapping[str, str]) -> bool:
    """Whether a file is what `write_dicom` writes, by whatever version of this package."""
    found, expected = dcmread(path), dcmread(io.BytesIO(_content(image, subject, marking)))
    elements = [{e.tag: e.value for e in dataset if e.keyword not in _OF_A_VERSION} for dataset in (found, expected)]
    return elements[0] == elements[1] and found.file_meta.TransferSyntaxUID == expected.file_meta.TransferSyntaxUID


def _content(image: Float32, subject: SyntheticSubject, marking: Mapping[str, str]) -> bytes:
    pixels = to_8_bit(image)
    if pixels.ndim == 4 and len(pixels) != 1:
        raise DataError("Colour volumes cannot be written as DICOM. Choose another of release.formats.")
    dataset = _patient_and_study(subject)
    _mark(dataset, marking)
    _image(dataset, pixels)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _uid(subject: SyntheticSubject, *parts: str) -> UID:
    message = "\0".join(parts).encode()
    digest = hmac.new(subject.run_id.encode(), message, hashlib.sha256).digest()
    return UID(f"2.25.{int.from_bytes(digest[:16], 'big')}")


def _patient_and_study(subject: SyntheticSubject) -> Dataset:
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPInstanceUID = _uid(subject, "instance", subject.sample_id)
    dataset.StudyInstanceUID = _uid(subject, "study", subject.sample_id)
    dataset.SeriesInstanceUID = _uid(subject, "series", subject.sample_id)
    dataset.StudyDate = dataset.StudyTime = dataset.AccessionNumber = dataset.ReferringPhysicianName = dataset.StudyID = ""
    dataset.Modality, dataset.ConversionType = "OT", "WSD"
    dataset.Manufacturer, dataset.ManufacturerModelName, dataset.SoftwareVersions = "dpsynth", "generator", __version__
    dataset.SecondaryCaptureDeviceManufacturer = "dpsynth"
    dataset.PatientName, dataset.PatientID = f"SYNTHETIC^{subject.sample_id}"[:64], f"SYN-{subject.sample_id}"[:64]
    dataset.PatientBirthDate, dataset.PatientSex = "", subject.sex
    if subject.age_years is not None:
        dataset.PatientAge = f"{min(max(subject.age_years, 0), 999):03d}Y"
    dataset.SeriesDescription = subject.label[:64]
    dataset.SeriesNumber = dataset.InstanceNumber = 1
    dataset.PatientOrientation = dataset.Laterality = ""
    return dataset


def _mark(dataset: Dataset, marking: Mapping[str, str]) -> None:
    dataset.SyntheticData = "YES"
    dataset.ImageType = ["DERIVED", "PRIMARY"]
    dataset.ContentQualification, dataset.QualityControlSubject = "RESEARCH", "NO"
    dataset.BurnedInAnnotation, dataset.LossyImageCompression = "NO", "00"
    dataset.PatientIdentityRemoved, dataset.DeidentificationMethod = "YES", "Fully synthetic image, no patient"
    dataset.ImageComments = "SYNTHETIC - AI GENERATED - NOT FOR DIAGNOSTIC USE"
    stated = "; ".join(f"{key}={value}" for key, value in sorted(marking.items()))
    dataset.DerivationDescription = f"AI-generated; {stated}"[:1024]
    purpose = Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning = "109102", "DCM", "Processing Equipment"
    machine = Dataset()
    machine.Manufacturer, machine.ManufacturerModelName, machine.SoftwareVersions = "dpsynth", "generator", __version__
    machine.ContributionDescription = "Generative AI synthesis of pixel data"
    machine.PurposeOfReferenceCodeSequence = [purpose]
    dataset.ContributingEquipmentSequence = [machine]


def _image(dataset: Dataset, pixels: NDArray[np.uint8]) -> None:
    volume, colour = pixels.ndim == 4, len(pixels) == 3
    sop_class = MultiFrameGrayscaleByteSecondaryCaptureImageStorage if volume else SecondaryCaptureImageStorage
    dataset.SOPClassUID = sop_class
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    if colour:
        dataset.PlanarConfiguration = 0
    if volume:
        frames = pixels.shape[1]
        dataset.NumberOfFrames, dataset.FrameIncrementPointer = frames, _PAGES
        dataset.PageNumberVector = list(range(1, frames + 1))
        dataset.PresentationLUTShape, dataset.RescaleType = "IDENTITY", "US"
        dataset.RescaleIntercept, dataset.RescaleSlope = 0, 1
    stored: Any = (np.moveaxis(pixels, 0, -1) if colour else pixels[0]).tobytes()
    dataset.PixelData = stored + b"\0" * (len(stored) % 2)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, dataset.SOPInstanceUID
    dataset.file_meta = meta
