"""From stored images to the arrays that everything else computes on: MONAI transforms with public constants."""

from __future__ import annotations

import math

import numpy as np
from monai.transforms import CenterSpatialCrop, Compose, Resize, ScaleIntensityRange, ScaleIntensityRangePercentiles

from dpsynth.config import DataConfig, IntensityRange
from dpsynth.data.cohort import Cohort, Float32, ImageSet, Record
from dpsynth.data.validate import decoded, require_usable
from dpsynth.errors import DataError
from dpsynth.progress import Progress

_PERCENTILES = (0.5, 99.5)  # that become -1 and 1 when each image is scaled by itself


def prepare(cohort: Cohort, config: DataConfig, *, progress: Progress) -> ImageSet:
    """Decode, check and resample every image of the cohort; the first `max_images_per_patient` of a patient by name are kept.

    Raises DataError for the first image or class that cannot be used.
    """
    require_usable(cohort)
    records = _capped(cohort, config.max_images_per_patient)
    transform = Preprocess(config.spatial_shape, config.intensity_range)
    images = np.empty((len(records), config.channels, *config.spatial_shape), dtype=np.float32)
    for index, record in enumerate(records):
        stored = decoded(record, dimensions=len(config.spatial_shape), channels=config.channels)
        require_in_range(stored.voxels, record.name, config.intensity_range)
        images[index] = transform(stored.voxels, spacing_mm=stored.spacing_mm)
        if images[index].min() == images[index].max():
            raise _nothing_left(record.name, config.intensity_range)
        if index % 50 == 49 or index + 1 == len(records):
            progress("read images", index + 1, len(records))
    ids = tuple(dict.fromkeys(record.patient_id for record in records))
    numbers = {patient_id: number for number, patient_id in enumerate(ids)}
    return ImageSet(
        images=images,
        labels=np.array([record.label for record in records], dtype=np.int64),
        patients=np.array([numbers[record.patient_id] for record in records], dtype=np.int64),
        patient_ids=ids,
        classes=cohort.classes,
        attributes=tuple(record.attributes for record in records),
    )


def require_in_range(stored: Float32, name: str, intensity_range: IntensityRange) -> None:
    """Raise DataError when the stored values cannot be meant for this range."""
    if intensity_range == "each":
        if np.ptp(np.percentile(stored, _PERCENTILES)) == 0:  # there would be nothing to scale by
            raise _nothing_left(name, intensity_range)
    elif np.count_nonzero(stored > intensity_range[1]) > stored.size / 2:  # no window is meant to: a 16-bit file among 8-bit ones, or MRI
        raise DataError(
            f"{name}: more than half of it lies above data.intensity_range {_shown(intensity_range)}. "
            "Correct the range, use data.intensity_range: each, or convert the file to the units of the others."
        )


def _nothing_left(name: str, intensity_range: IntensityRange) -> DataError:
    return DataError(f"{name}: nothing is left of it within data.intensity_range {_shown(intensity_range)}. Correct the range.")


def _shown(intensity_range: IntensityRange) -> str:
    return intensity_range if intensity_range == "each" else f"[{intensity_range[0]:g}, {intensity_range[1]:g}]"


class Preprocess:
    """Intensity range to [-1, 1] with clamping; resampling that keeps the aspect, covers the target and crops its centre."""

    def __init__(self, spatial_shape: tuple[int, ...], intensity_range: IntensityRange) -> None:
        self.spatial_shape = spatial_shape
        self._scale = (
            ScaleIntensityRangePercentiles(*_PERCENTILES, b_min=-1.0, b_max=1.0, clip=True)
            if intensity_range == "each"
            else ScaleIntensityRange(*intensity_range, b_min=-1.0, b_max=1.0, clip=True)
        )
        self._crop = CenterSpatialCrop(spatial_shape)

    def __call__(self, voxels: Float32, *, spacing_mm: tuple[float, ...] | None = None) -> Float32:
        """(channel, *space) as stored to (channel, *spatial_shape) in [-1, 1]; keeps the aspect in millimetres where known."""
        space = voxels.shape[1:]
        sizes = tuple(side * step for side, step in zip(space, spacing_mm or (1.0,) * len(space), strict=True))
        factor = max(target / size for target, size in zip(self.spatial_shape, sizes, strict=True))
        covering = tuple(max(t, math.floor(size * factor + 0.5)) for t, size in zip(self.spatial_shape, sizes, strict=True))
        if space == covering:
            return np.asarray(Compose([self._scale, self._crop])(voxels), dtype=np.float32)
        smooth = "bilinear" if len(space) == 2 else "trilinear"
        shrinks = any(new < old for new, old in zip(covering, space, strict=True))
        resize = Resize(covering, mode="area" if shrinks else smooth)  # area averages, so shrinking does not alias
        return np.asarray(Compose([self._scale, resize, self._crop])(voxels), dtype=np.float32)


def _capped(cohort: Cohort, limit: int) -> tuple[Record, ...]:
    kept: list[Record] = []
    counts: dict[str, int] = {}
    for record in sorted(cohort.records, key=lambda record: (record.patient_id, record.name)):
        counts[record.patient_id] = counts.get(record.patient_id, 0) + 1
        if counts[record.patient_id] <= limit:
            kept.append(record)
    return tuple(kept)
