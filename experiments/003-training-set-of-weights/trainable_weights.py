"""What should DP-SGD train after the transplant, and what does its noise cost? On public images alone, so that no budget is touched.

    DPSYNTH_DATA=... python experiments/003-training-set-of-weights/trainable_weights.py [--variants ...] [--seeds 0]
    python experiments/003-training-set-of-weights/trainable_weights.py --table

The part of the private set is played by 4,700 procedural chest images (28 px, two classes), the public ones are 1,000 adult X-rays: the gap
between the two is wider than between two hospitals. Epsilon 10, delta 1e-5. "without noise" is a ceiling and no privacy at all.
Results go to results.json, one line a variant and seed, with the figures of 800 images at two last noise levels of the sampler.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpsynth.checks.classifier import auc, train_and_predict
from dpsynth.checks.features import encode
from dpsynth.checks.statistics import kid, neighbourhoods
from dpsynth.config import Config, parse_config
from dpsynth.data.cohort import Float32, ImageSet, Int64
from dpsynth.data.phantom import phantom_cohort
from dpsynth.model.denoiser import Denoiser
from dpsynth.model.generator import Generator
from dpsynth.model.moment_release import moment_queries, release_moments
from dpsynth.model.moments import public_reference
from dpsynth.plan import planned_mechanisms
from dpsynth.privacy.accountant import FINE
from dpsynth.privacy.mechanism import MomentRelease, PoissonDpSgd
from dpsynth.privacy.noise import NoiseStream
from dpsynth.progress import silent
from dpsynth.train.loop import fit
from dpsynth.train.pretrain import pretrained_weights
from dpsynth.train.public import public_images

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from results import add, known  # noqa: E402 (an experiment is a script; what several share lies one folder up)

PATIENTS, TEST, REFERENCE, SAMPLE, LAST_LEVELS = 4700, 500, 1500, 800, (0.04, 0.08)
BASE: dict[str, Any] = {"learning_rate": 1e-3, "steps": 80, "sampling_probability": 0.05}
VARIANTS: dict[str, dict[str, Any]] = {  # settings of diffusion; share: of mu^2 for the moments; noise: whether there is any
    "transplant alone": {"steps": 1, "share": 0.999},
    "defaults": {"trainable": "small", "learning_rate": 3e-4, "steps": 40, "sampling_probability": 0.1},  # of that time
    "small set, larger steps": {**BASE, "trainable": "small", "learning_rate": 3e-3, "share": 0.5},
    "small set, larger steps, without noise": {**BASE, "trainable": "small", "learning_rate": 3e-3, "share": 0.5, "noise": False},
    "all weights": {**BASE, "trainable": "all", "share": 0.5},
    "all weights of half the channels": {**BASE, "trainable": "all", "share": 0.5, "channels": [16, 32]},
    "all weights, without noise": {**BASE, "trainable": "all", "share": 0.5, "noise": False},
}


def configuration(variant: str) -> Config:
    """The recipe with the variant's settings."""
    settings = dict(VARIANTS[variant])
    share = settings.pop("share", 0.8)
    settings.pop("noise", None)
    folder = os.environ.get("DPSYNTH_DATA")
    if folder is None or not (Path(folder) / "nih1000").is_dir():
        sys.exit("Set DPSYNTH_DATA to a folder with nih1000/ (sources: experiments/README.md).")
    data = {"format": "phantom", "name": "phantoms", "unit": "image", "classes": ["normal", "finding"], "declared_patients": PATIENTS}
    public = {"source": "raster", "path": str(Path(folder).resolve() / "nih1000"), "classes": ["normal", "abnormal"]}
    text = {
        "method": "diffusion",
        "data": {**data, "spatial_shape": [28, 28]},
        "privacy": {"epsilon": 10, "delta": 1e-5},
        "moments": {"share": share},
        "diffusion": settings,
        "pretrain": {**public, "steps": 700, "cache": str(Path("runs/003/pretrained").resolve())},
    }
    return parse_config(json.dumps(text), base=Path.cwd())  # JSON is YAML


def phantoms() -> tuple[ImageSet, tuple[Float32, Int64]]:
    """One image each of 4,700 procedural people, and of 500 others for testing."""
    cohort = phantom_cohort(
        anatomy="chest", num_patients=PATIENTS + TEST, max_images=1, spatial_shape=(28, 28), channels=1,
        classes=("normal", "finding"), seed=77, name="phantoms",
    )  # fmt: skip
    images = np.stack([record.read().voxels for record in cohort.records]) / np.float32(127.5) - 1
    labels = np.array([record.label for record in cohort.records])
    numbers = np.arange(PATIENTS)
    training = ImageSet(
        images=images[:PATIENTS].astype(np.float32),
        labels=labels[:PATIENTS],
        patients=numbers,
        patient_ids=tuple(str(number) for number in numbers),
        classes=cohort.classes,
        attributes=({},) * PATIENTS,
    )
    return training, (images[PATIENTS:].astype(np.float32), labels[PATIENTS:])


def trained(config: Config, variant: str, training: ImageSet, seed: int) -> tuple[Generator, float]:
    """The generator of a variant, and the seconds of DP-SGD."""
    public = public_images(config, progress=silent)
    reference = public_reference(public, low_frequencies=config.moments.low_frequencies)
    mechanisms = planned_mechanisms(config, delta=1e-5, queries=moment_queries(reference), interval=FINE)
    release = next(m for m in mechanisms if isinstance(m, MomentRelease))
    sgd = next(m for m in mechanisms if isinstance(m, PoissonDpSgd))
    stream = NoiseStream(key=hashlib.sha256(f"public experiment {seed}".encode()).digest())
    moments = release_moments(
        training.images, training.labels, training.patients, num_classes=2, mechanism=release, reference=reference, stream=stream
    )
    weights = pretrained_weights(config, public, reference, progress=silent)
    denoiser = Denoiser(moments, channels=config.diffusion.channels)
    denoiser.net.load_state_dict(weights)
    start = time.monotonic()
    if config.diffusion.steps > 1:
        mechanism = sgd if VARIANTS[variant].get("noise", True) else replace(sgd, noise_multiplier=1e-6)
        with tempfile.TemporaryDirectory() as folder:
            fit(
                denoiser, training, mechanism, config.diffusion,
                stream=stream, checkpoint=Path(folder) / "c.safetensors", binding="", callback=lambda _: None,
            )  # fmt: skip
    seconds = time.monotonic() - start
    return Generator(classes=("normal", "finding"), moments=moments, denoiser=denoiser, net_channels=(), texture=False), seconds


def measured(generator: Generator, config: Config, against: np.ndarray[Any, Any], test: tuple[Float32, Int64], seed: int) -> dict[str, Any]:
    """Fidelity and utility at each last noise level."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(2, size=SAMPLE, p=generator.label_probabilities)
    seeds = rng.integers(0, 2**63, SAMPLE).astype(np.uint64)
    found = {}
    for level in LAST_LEVELS:
        images = generator.sample(labels, seeds, config.generate.model_copy(update={"sigma_min": level}), progress=silent)
        features = encode(images, task="", progress=silent)
        scores = train_and_predict(images, labels, test[0], classes=2, seed=seed, task="", progress=silent)
        found[f"{level:g}"] = {
            "auc": auc(scores, test[1]), "kid": kid(against[:SAMPLE], features), **neighbourhoods(against, features).__dict__,
        }  # fmt: skip
    return found


def table(results: dict[str, Any]) -> str:
    """In Markdown."""
    columns = ("auc", "kid", "precision", "recall", "coverage")
    lines = ["| variant | seed | last level | " + " | ".join(columns) + " | DP-SGD, s |", "|---|---|---|" + "---|" * (len(columns) + 1)]
    for name, result in results.items():
        variant, seed = name.rsplit("/", 1)
        for level, figures in result["figures"].items():
            cells = " | ".join(f"{figures[column]:.3f}" for column in columns)
            lines.append(f"| {variant} | {seed} | {level} | {cells} | {result['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the wanted variants; results.json is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--table", action="store_true", help="Print the table of results.json and do nothing else.")
    arguments = parser.parse_args()
    path = HERE / "results.json"

    if not arguments.table:
        training, test = phantoms()
        against = encode(training.images[:REFERENCE], task="", progress=silent)
        for seed in arguments.seeds:
            for variant in arguments.variants:
                config = configuration(variant)
                torch.manual_seed(seed)
                generator, seconds = trained(config, variant, training, seed)
                figures = measured(generator, config, against, test, seed)
                add(path, f"{variant}/{seed}", {"seconds": seconds, "figures": figures})
    print(table(known(path)))


if __name__ == "__main__":
    main()
