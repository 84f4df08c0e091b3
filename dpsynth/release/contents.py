"""Archive, table and pictures of a release: all made of the same images, and compared with them by whoever has the folder. Torch-free.

Of a release of several hospitals the archive is what they approved, and their plan names the classes; of one site's, it is what it signed.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsynth.data.candidates import Candidates, to_unit_range
from dpsynth.data.cohort import Float32
from dpsynth.data.dicom_marking import SyntheticSubject, is_dicom_of, write_dicom
from dpsynth.data.medmnist import archive_arrays
from dpsynth.data.nifti import is_nifti_of, write_nifti
from dpsynth.data.raster import is_png_of, write_png
from dpsynth.errors import ArtifactError
from dpsynth.privacy.guarantee import Guarantee
from dpsynth.release.mark import marking
from dpsynth.release.metadata import unexpected_in

ARCHIVE, TABLE, PICTURES = "synthetic.npz", "labels.csv", "images/"
_SUFFIXES = {"png": ".png", "nifti": ".nii.gz", "dicom": ".dcm"}
_DICOM_SEXES = ("F", "M", "O")
_TRAIN = "train_"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image (channel, *space) in [-1, 1], and what its files say of it."""

    release_id: str
    index: int
    image: Float32
    label: str
    condition: Mapping[str, str]
    guarantee: Guarantee

    @property
    def marks(self) -> dict[str, str]:
        """Text that goes into a file."""
        return marking(release_id=self.release_id, index=self.index, label=self.label, attributes=self.condition, guarantee=self.guarantee)

    @property
    def subject(self) -> SyntheticSubject:
        """For DICOM."""
        sex = self.condition.get("sex", "")
        known = sex if sex in _DICOM_SEXES else ""
        return SyntheticSubject(run_id=self.release_id, sample_id=f"{self.index:06d}", label=self.label, sex=known)

    def write(self, folder: Path, kind: str) -> None:
        """As a file of this format."""
        path = folder / picture_name(self.index, kind)
        if kind == "png":
            write_png(path, self.image, text=self.marks)
        elif kind == "nifti":
            write_nifti(path, self.image, spacing_mm=None, marking=self.marks)
        else:
            write_dicom(path, self.image, subject=self.subject, marking=self.marks)

    def problem(self, folder: Path, kind: str) -> str:
        """Why the file of this format is not the one that `write` makes; empty when it is."""
        name = picture_name(self.index, kind)
        try:
            if rider := unexpected_in(folder / name, name, set()):
                return f"{name}: {rider}"
            if kind == "png":
                same = is_png_of(folder / name, self.image, text=self.marks)
            elif kind == "nifti":
                same = is_nifti_of(folder / name, self.image, spacing_mm=None, marking=self.marks)
            else:
                same = is_dicom_of(folder / name, self.image, subject=self.subject, marking=self.marks)
        except Exception as error:  # pillow, nibabel, pydicom and gzip raise many kinds for broken files
            return f"{name}: it cannot be read ({type(error).__name__})"
        return "" if same else f"{name}: it is not image {self.index} of {ARCHIVE}, or does not say what it is"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """candidates: the images. classes: name by label. formats: of the pictures, in the order of the table's columns."""

    release_id: str
    candidates: Candidates
    classes: Mapping[int, str]
    guarantee: Guarantee
    formats: Sequence[str]

    @property
    def total(self) -> int:
        """How many images."""
        return len(self.candidates.images)

    def extra(self) -> dict[str, NDArray[np.generic]]:
        """Arrays of the archive beside images and labels."""
        provenance = json.dumps({"synthetic": True, "release": self.release_id}, sort_keys=True).encode()
        return {
            "synthetic": np.array([1], dtype=np.uint8),
            "provenance": np.frombuffer(provenance, dtype=np.uint8),
            **{_TRAIN + name: values for name, values in self.candidates.attributes.items()},
        }

    def table(self) -> bytes:
        """The table of labels."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["index", "label", *self.candidates.attributes, "synthetic", *self.formats])
        for index, (label, condition) in enumerate(zip(self.candidates.labels.tolist(), self.candidates.conditions(), strict=True)):
            files = [picture_name(index, kind) for kind in self.formats]
            writer.writerow([index, self.classes[label], *condition.values(), 1, *files])
        return table.getvalue().encode()

    def pictures(self) -> Iterator[Picture]:
        """One after the other."""
        for index, (label, condition) in enumerate(zip(self.candidates.labels.tolist(), self.candidates.conditions(), strict=True)):
            yield Picture(
                release_id=self.release_id,
                index=index,
                image=to_unit_range(self.candidates.images[index]),
                label=self.classes[label],
                condition=condition,
                guarantee=self.guarantee,
            )


def picture_name(index: int, kind: str) -> str:
    """Of the file of an image in a format, in the folder."""
    return f"{PICTURES}synthetic-{index:06d}{_SUFFIXES[kind]}"


def content_problems(
    folder: Path, *, names: Sequence[str], release_id: str, number: int, guarantee: Guarantee, classes: Sequence[str] | None
) -> list[str]:
    """Where archive, table and pictures of a released folder do not say the same, or hold more than that.

    names: of the folder's files. number: of images, as signed. classes: names of the labels; of one site's release none, and the table is
    taken at its word.
    """
    try:
        arrays = _arrays(folder / ARCHIVE)
        candidates = _candidates(arrays)
        table = (folder / TABLE).read_bytes()
        rows = list(csv.reader(io.StringIO(table.decode())))
        formats = rows[0][3 + len(candidates.attributes) :]
        said = dict(zip(candidates.labels.tolist(), (row[1] for row in rows[1:]), strict=True))
        named = said if classes is None else dict(enumerate(classes))
        contents = Contents(release_id=release_id, candidates=candidates, classes=named, guarantee=guarantee, formats=formats)
        problems = _archive_problems(folder / ARCHIVE, arrays, contents)
        if contents.total != number:
            problems.append(f"{ARCHIVE}: it holds {contents.total} images, and {number} were signed")
        if len(set(contents.classes.values())) < len(contents.classes) or table != contents.table():
            problems.append(f"{TABLE}: it is not the table of the images in {ARCHIVE}")
        wanted = {picture_name(index, kind) for index in range(contents.total) for kind in formats}
    except ArtifactError as error:
        return [f"{ARCHIVE}: {error}"]
    except (KeyError, IndexError, ValueError, csv.Error):
        return [f"{TABLE}: it is not the table of the images in {ARCHIVE}"]
    found = {name for name in names if name.startswith(PICTURES)}
    problems += [f"{name}: {TABLE} does not list it" for name in sorted(found - wanted)]
    problems += [f"{name}: missing, and {TABLE} lists it" for name in sorted(wanted - found)]
    if not problems:
        problems = [problem for picture in contents.pictures() for kind in formats if (problem := picture.problem(folder, kind))]
    return problems


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile, its decompressors and numpy raise many kinds for broken files
        raise ArtifactError(f"Expected an archive of images, found something unreadable ({type(error).__name__}).") from error


def _candidates(arrays: Mapping[str, NDArray[Any]]) -> Candidates:
    """The images of an archive. Raises ArtifactError."""
    images, labels = arrays.get("train_images"), arrays.get("train_labels")
    own = ("train_images", "train_labels")
    attributes = {name.removeprefix(_TRAIN): values for name, values in arrays.items() if name.startswith(_TRAIN) and name not in own}
    whole = images is not None and labels is not None and images.ndim >= 3 and images.dtype == np.uint8 and labels.dtype == np.uint8
    if images is None or labels is None or not whole or any(part.shape[:1] != images.shape[:1] for part in (labels, *attributes.values())):
        raise ArtifactError("Expected 8-bit images with a label and attributes each, found something else.")
    colour = images.shape[-1] == 3  # no side of an image is that short
    return Candidates(
        images=np.moveaxis(images, -1, 1) if colour else images[:, None],
        labels=labels.reshape(-1).astype(np.int64),
        seeds=np.zeros(len(images), dtype=np.uint64),
        attributes=attributes,
    )


def _archive_problems(path: Path, arrays: Mapping[str, NDArray[Any]], contents: Contents) -> list[str]:
    candidates = contents.candidates
    expected = {**archive_arrays(candidates.images, candidates.labels), **contents.extra()}
    problems = [unexpected_in(path, ARCHIVE, {_TRAIN + name for name in candidates.attributes})]
    for name, values in expected.items():
        found = arrays.get(name)
        if found is None or found.dtype != values.dtype or not np.array_equal(found, values):
            problems.append(f"{name} is not what a release of these images has there")
    return [f"{ARCHIVE}: {problem}" for problem in problems if problem]
