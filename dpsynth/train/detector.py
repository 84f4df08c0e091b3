"""A detector for the run's images that has seen no patient: public images against what the run's own generator makes of public images.

The finished net, given the moments of the public images in place of the private ones, draws images of the public kind: both sides show the
same kind of thing, and what tells them apart is how they were made. Net and sampler are released quantities or public, so this is
post-processing and costs no privacy. Setting the release's own images against public ones would be easier and wrong: such a detector tells
the hospital from the public set, and calls every real image of the hospital synthetic (docs/adr/0018).
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dpsynth.config import Config, GenerateConfig
from dpsynth.data.candidates import to_8_bit
from dpsynth.data.cohort import Float32
from dpsynth.data.halve import halved
from dpsynth.detector.evaluation import OWN, own_quality, trained_detector
from dpsynth.detector.model import Detector
from dpsynth.detector.traces import traces
from dpsynth.model.generator import Generator
from dpsynth.model.moment_release import release_moments
from dpsynth.model.moments import Moments, public_reference
from dpsynth.progress import Progress
from dpsynth.train.public import public_images

MOST = 400  # public images, and images of each generator
LIMITS = (
    "Trained on public images and on what this release's generator makes of them; no image of a patient was used. It was never tested on "
    "real images of the hospital, on images that were resized or compressed with loss, or on other generators than those named. A "
    "probability is not evidence: signature and marks say what comes from this release, for files that still have them."
)


def train_detector(config: Config, generator: Generator, released: NDArray[np.uint8], *, progress: Progress) -> Detector:
    """Train on at most 400 images a side; `released`, the candidates (n, channel, *space), are judged afterwards and not trained on.

    Whether it may be released is for `evaluation.unfit` to say: where the public images are of another kind than the hospital's, it would
    call the hospital's real images synthetic as well (experiments/010-detector).
    """
    public = public_images(config, progress=progress)
    public = public[np.linspace(0, len(public) - 1, min(MOST, len(public))).astype(int)]
    real = traces(to_8_bit(public))
    drawn = {name: traces(to_8_bit(images)) for name, images in _drawn(config, generator, public, progress=progress).items()}
    made = trained_detector(real, drawn, shape=generator.shape)
    rows = traces(released)
    own = own_quality(made.of_traces(rows), made.knows(rows))
    evaluation = {**made.evaluation, OWN: own, "public images": len(real), "limits": LIMITS}
    return replace(made, evaluation=evaluation)


def _drawn(config: Config, generator: Generator, public: Float32, *, progress: Progress) -> dict[str, Float32]:
    """Images of the public kind by each generator at hand, as many as public ones."""
    moments = _public_moments(config, generator, public)
    cells = np.arange(len(public), dtype=np.int64) % moments.num_classes
    settings = config.generate
    plain = replace(generator, moments=moments, denoiser=None, parents=None)
    asked: dict[str, tuple[Generator, GenerateConfig]] = {
        "moments, with texture": (replace(plain, texture=True), settings),
        "moments, without texture": (replace(plain, texture=False), settings),
    }
    if generator.denoiser is not None:
        denoiser = copy.deepcopy(generator.denoiser)
        denoiser.transplant(moments)
        net = replace(plain, denoiser=denoiser).with_released_detail(settings, progress=progress)
        fewer = settings.model_copy(update={"steps": max(2, settings.steps // 2), "sigma_min": 2 * settings.sigma_min})
        asked |= {"net": (net, settings), "net, half the steps, twice the last noise level": (net, fewer)}
    drawn = {}
    for number, (name, (made, how)) in enumerate(asked.items()):
        seeds = np.arange(len(public), dtype=np.uint64) + np.uint64(number * len(public))
        drawn[name] = made.sample(cells, seeds, how, progress=progress)
        progress("images for the detector", number + 1, len(asked))
    return drawn


def _public_moments(config: Config, generator: Generator, public: Float32) -> Moments:
    """Exact moments of the public images, in as many classes as the net knows, dealt out in turn."""
    classes, public = generator.moments.num_classes, halved(public, len(generator.enlargers))
    return release_moments(
        public,
        np.arange(len(public), dtype=np.int64) % classes,
        np.arange(len(public), dtype=np.int64),
        num_classes=classes,
        mechanism=None,
        reference=public_reference(public, low_frequencies=config.moments.low_frequencies),
        stream=None,
    )
