"""From the configuration to a cohort, whatever the format."""

from __future__ import annotations

from dpsynth.config import DataConfig
from dpsynth.data.attributes import columns, with_declared_values
from dpsynth.data.cohort import Cohort
from dpsynth.data.dicom import read_dicom
from dpsynth.data.exclusions import require_permission, without_excluded
from dpsynth.data.medmnist import read_medmnist
from dpsynth.data.nifti import read_nifti
from dpsynth.data.phantom import phantom_cohort
from dpsynth.data.raster import read_raster
from dpsynth.data.validate import require_known_labels
from dpsynth.errors import DataError


def read_cohort(config: DataConfig) -> Cohort:
    """List the images of `config` without decoding them, without the excluded ones, each declared attribute with a public value.

    Raises DataError, also for an image that is there without permission.
    """
    cohort = require_known_labels(without_excluded(listed(config), config), config)
    require_permission(cohort, config)
    return with_declared_values(cohort, config)


def listed(config: DataConfig) -> Cohort:
    """List all images of `config`, as the files have them: labels that are not in `classes` come behind them. Raises DataError."""
    if config.format == "phantom":
        return phantom_cohort(
            anatomy=config.phantom.anatomy,
            num_patients=config.phantom.num_patients,
            max_images=config.phantom.max_images,
            spatial_shape=config.spatial_shape,
            channels=config.channels,
            classes=config.classes,
            seed=config.phantom.seed,
            name=config.name,
        )
    path = config.path
    if path is None or not path.exists():
        raise DataError(f"Expected images at {path}, found nothing. Check data.path.")
    dimensions = len(config.spatial_shape)
    if config.format == "medmnist":
        return read_medmnist(
            path, name=config.name, split=config.medmnist_split, classes=config.classes, dimensions=dimensions, any_label=True
        )
    if config.format == "raster":
        return read_raster(
            path,
            name=config.name,
            unit=config.unit,
            classes=config.classes,
            label_column=config.label_column,
            channels=config.channels,
            any_label=True,
        )
    if config.format == "dicom":
        return read_dicom(
            path,
            name=config.name,
            unit=config.unit,
            classes=config.classes,
            label_column=config.label_column,
            dimensions=dimensions,
            attribute_columns=(*columns(config), *([config.permission_column] if config.permission_column else [])),
            any_label=True,
        )
    return read_nifti(path, name=config.name, unit=config.unit, classes=config.classes, label_column=config.label_column, any_label=True)
