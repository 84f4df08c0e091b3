"""What a coordinator trains on public images before and after the rounds: the net that they begin with, and what enlarges its images."""

from __future__ import annotations

from pathlib import Path

from dpsynth.config import Config
from dpsynth.data.halve import halved
from dpsynth.model.enlarger import Enlarger
from dpsynth.model.moments import public_reference
from dpsynth.progress import Progress, silent
from dpsynth.train.pretrain import pretrained_weights
from dpsynth.train.pretrain_enlarger import pretrained_enlargers
from dpsynth.train.public import public_images
from federated.messages import Arrays
from federated.rounds import NET

PRETRAINED = "pretrained"  # folder of a coordinator


def public_weights(config: Config, *, kept: Path | None = None, progress: Progress = silent) -> Arrays:
    """The net's weights after pre-training on public images, with which the first round begins. kept: a folder from which they are taken
    when equal settings were trained before.
    """
    config = _keeping(config, kept)
    images = halved(public_images(config, progress=progress), config.halvings)
    reference = public_reference(images, low_frequencies=config.moments.low_frequencies)
    return {NET + name: tensor.numpy() for name, tensor in pretrained_weights(config, images, reference, progress=progress).items()}


def public_enlargers(config: Config, *, kept: Path | None = None, progress: Progress = silent) -> tuple[Enlarger, ...]:
    """What brings the net's images to their full size; none where sites learn from that size."""
    if not config.halvings:
        return ()
    config = _keeping(config, kept)
    return pretrained_enlargers(config, public_images(config, progress=progress), progress=progress)


def _keeping(config: Config, kept: Path | None) -> Config:
    if config.pretrain.cache is not None:
        return config
    return config.model_copy(update={"pretrain": config.pretrain.model_copy(update={"cache": kept})})
