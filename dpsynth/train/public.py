"""Public images for pre-training and for public constants: procedural ones, or a public folder that the configuration names."""

from __future__ import annotations

import numpy as np

from dpsynth.config import Config, DataConfig
from dpsynth.data.cohort import Float32
from dpsynth.data.phantom import phantom_images
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.errors import ConfigError, DataError
from dpsynth.progress import Progress


def public_images(config: Config, *, progress: Progress) -> Float32:
    """Images (n, channel, *space) in [-1, 1]. Raises DataError for a public folder that cannot be used."""
    settings, data = config.pretrain, config.data
    if settings.source == "phantom":
        return phantom_images(
            anatomies=settings.anatomies,
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
    try:
        return prepare(read_cohort(source), source, progress=progress).images
    except DataError as error:
        raise DataError(f"public images: {error} Here that is the setting of pretrain, not of data.") from error


def require_public(config: Config) -> None:
    """Raise ConfigError when the public images would be read from where the private ones lie, or around them."""
    if config.pretrain.path is None or config.data.path is None:
        return
    public, private = config.pretrain.path.resolve(), config.data.path.resolve()
    if public == private or public in private.parents or private in public.parents:
        raise ConfigError("pretrain.path: expected public images, found the place of the private ones. Name another folder.")


def require_disjoint(public: Float32, private: Float32) -> None:
    """Raise DataError when a prepared public image (n, channel, *space) equals a private one: it would be learned free of charge."""
    known = {_grey_levels(image) for image in private}
    shared = sum(_grey_levels(image) in known for image in public)
    if shared:
        raise DataError(f"pretrain: {shared} of the public images are among the private ones. Remove them from the public set.")


def _grey_levels(image: Float32) -> bytes:
    return bytes(np.rint(image * 127.5).astype(np.int16).tobytes())
