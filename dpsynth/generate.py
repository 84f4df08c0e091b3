"""From a trained generator to candidates: 8-bit images with labels, each with a seed of its own.

Drawing reads no private data, so it costs no privacy. What is checked and released are the 8-bit candidates written here.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpsynth.artifacts import RunFolder
from dpsynth.config import GenerateConfig, parse_config
from dpsynth.data.candidates import Candidates, save_candidates, to_8_bit
from dpsynth.model.generator import Generator
from dpsynth.progress import Progress


def generate(run_path: Path, *, progress: Progress) -> int:
    """Draw the candidates of the run at `run_path`; a second call draws the same ones. Returns their number."""
    run = RunFolder.open(run_path)
    run.require("train")
    config = parse_config(run.config_text, base=run.path)
    run.reset("generate")
    candidates = draw(Generator.load(run.folder("train")), config.generate, progress=progress)
    save_candidates(run, candidates)
    run.complete("generate", needs=("train",), facts={"count": len(candidates.images)})
    return len(candidates.images)


def draw(generator: Generator, settings: GenerateConfig, *, progress: Progress) -> Candidates:
    """Draw `settings.count` images; equal settings give equal images."""
    labels = mixed_labels(settings, generator.label_probabilities)
    seeds = image_seeds(settings.seed, len(labels))
    images = generator.sample(labels, seeds, settings, progress=progress)
    return Candidates(images=to_8_bit(images), labels=labels, seeds=seeds)


def mixed_labels(settings: GenerateConfig, probabilities: NDArray[np.float64]) -> NDArray[np.int64]:
    """Labels in the wanted mix: (count,), every class with probability above zero at least once where count allows."""
    classes = len(probabilities)
    shares = np.full(classes, 1 / classes) if settings.label_mix == "balanced" else np.asarray(probabilities, dtype=np.float64)
    exact = shares / shares.sum() * settings.count
    counts = np.floor(exact).astype(np.int64)
    largest_remainders = np.argsort(-(exact - counts), kind="stable")[: settings.count - int(counts.sum())]
    counts[largest_remainders] += 1
    labels = np.repeat(np.arange(classes, dtype=np.int64), counts)
    return np.random.default_rng(settings.seed).permutation(labels)


def image_seeds(seed: int, count: int) -> NDArray[np.uint64]:
    """One 64-bit seed per image, the same for image i whatever the count."""
    digests = (hashlib.sha256(f"dpsynth image {seed} {index}".encode()).digest()[:8] for index in range(count))
    return np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.uint64)
