"""Public images for pre-training and for public constants: procedural ones, or a public folder that the configuration names."""

from __future__ import annotations

from dpsynth.config import Config, DataConfig
from dpsynth.data.cohort import Float32
from dpsynth.data.phantom import phantom_images
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.progress import Progress


def public_images(config: Config, *, progress: Progress) -> Float32:
    """Images (n, channel, *space) in [-1, 1]. Raises DataError for a public folder that cannot be used."""
    settings, data = config.pretrain, config.data
    if settings.source == "phantom":
        return phantom_images(
            num_images=settings.num_phantoms,
            spatial_shape=data.spatial_shape,
            channels=data.channels,
            num_classes=2,
            seed=settings.seed,
        )[0]
    source = DataConfig(
        format=settings.source,
        path=settings.path,
        name="public images",
        unit="image",
        classes=settings.classes,
        label_column=settings.label_column,
        spatial_shape=data.spatial_shape,
        channels=data.channels,
        intensity_range=settings.intensity_range or data.intensity_range,
    )
    return prepare(read_cohort(source), source, progress=progress).images
