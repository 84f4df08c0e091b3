"""From a trained generator to candidates: 8-bit images with labels and attributes, each with a seed of its own.

Drawing reads no private data, so it costs no privacy. What is checked and released are the 8-bit candidates written here.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsynth import __version__
from dpsynth.artifacts import RunFolder, json_bytes, read_json, write_json
from dpsynth.cells import FEWEST_PATIENTS, LABEL, Cells, fit_shares, independent_problem, target_problem
from dpsynth.checks.screening import Decision, screen_candidates
from dpsynth.checks.verdict import CONTENT
from dpsynth.config import Config, GenerateConfig, parse_config
from dpsynth.data.candidates import WITHHELD, Candidates, CellRow, load_cell_rows, save_candidates, save_cell_rows, to_8_bit
from dpsynth.detector.evaluation import doubts, unfit
from dpsynth.detector.model import FILE as DETECTOR
from dpsynth.detector.model import NO_DETECTOR, Detector
from dpsynth.errors import ArtifactError, GateRefused, UsageError
from dpsynth.model.generator import Generator
from dpsynth.progress import Progress, say_nothing
from dpsynth.train.detector import train_detector

Target = Mapping[str, Mapping[str, float]]
_MIX = ("target", "independent")  # settings that a call may change
_CHECK_GOES = (
    "this run was checked. Other settings draw other candidates, which take the place of the checked ones: check and report will be "
    "removed, and another check counts as another attempt at the gate. Stop now to keep them"
)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """How many candidates there are, and what should be known about them, a line each. already: they were there, nothing was changed."""

    count: int
    warnings: tuple[str, ...]
    already: bool = False


def generate(
    run_path: Path,
    *,
    progress: Progress,
    target: Target | None = None,
    independent: Sequence[str] = (),
    warn: Callable[[str], None] = say_nothing,
) -> Drawn:
    """Draw the candidates of the run at `run_path`. `target` stands above that of the configuration, `independent` adds to it.

    Candidates that these settings have drawn stay, with their check. Others take their place when they are drawn, and the check goes;
    `warn` is told so before. Raises UsageError for a mix that cannot be drawn.
    """
    run = RunFolder.open(run_path)
    run.require("train")
    config = parse_config(run.config_text, base=run.path)
    settings = _with_mix(config.generate, target or {}, independent, config.data.cells)
    mix = {name: value for name in _MIX if (value := getattr(settings, name))}
    made_by = {"dpsynth": __version__, **json.loads(json_bytes(mix))}
    stored = _stored(run)
    if stored and all(stored.get(name) == made_by.get(name) for name in ("dpsynth", *_MIX)):
        return _drawn(run, stored, already=True)
    if run.is_complete("check"):
        warn(_CHECK_GOES)
    generator = Generator.load(run.folder("train"))
    drawn = draw(generator, settings, progress=progress)
    screening = screen_candidates(drawn, generator.cells, generator.moments, config.gate.content, sample_key=b"", progress=progress)
    rejected = screening.of(Decision.REJECT)
    if rejected.all():
        raise GateRefused(f"The policy rejects all {len(rejected)} drawn images: {screening.counts(Decision.REJECT)}. Train for longer.")
    candidates = drawn.kept(~rejected)
    run.reset("generate")
    save_candidates(run, candidates)
    lacking = _detector(config, generator, candidates, run, progress) if config.release.detector else ""
    log = screening.log(drawn.seeds)
    write_json(run.folder("generate") / CONTENT, [row for row in log if row["decision"] == Decision.REJECT.value])
    if generator.attributes:
        save_cell_rows(run, cell_rows(generator, candidates))
    without = {NO_DETECTOR: lacking} if lacking else {}
    facts = {"count": len(candidates.images), WITHHELD: int(rejected.sum()), **without, **made_by}
    run.complete("generate", needs=("train",), facts=facts)
    return _drawn(run, facts, already=False)


def _stored(run: RunFolder) -> Mapping[str, Any]:
    """The facts of a stage that is complete, unchanged and of this generator; the configuration of a run never changes."""
    try:
        return run.require("generate").facts
    except ArtifactError:  # none, one that was cut off, or one that was spoilt: drawing again mends it
        return {}


def _drawn(run: RunFolder, facts: Mapping[str, Any], *, already: bool) -> Drawn:
    """What is to be said of the stage with these facts."""
    count, left_out = int(facts["count"]), int(facts[WITHHELD])
    warnings = small_cells(load_cell_rows(run))
    if left_out:
        grounds = Counter(ground for row in read_json(run.folder("generate") / CONTENT) for ground in row["grounds"])
        named = ", ".join(f"{ground} {number}" for ground, number in grounds.items())
        warnings = (f"{left_out} of {count + left_out} drawn images were withheld ({named})", *warnings)
    if lacking := facts.get(NO_DETECTOR):
        warnings = (f"no detector was made, and a release would have none: {lacking}", *warnings)
    detector = run.folder("generate") / DETECTOR
    if detector.is_file() and (doubt := doubts(Detector.from_json(read_json(detector)).evaluation)):
        warnings = (doubt, *warnings)
    return Drawn(count=count, warnings=warnings, already=already)


def _detector(config: Config, generator: Generator, candidates: Candidates, run: RunFolder, progress: Progress) -> str:
    """Write the detector beside the candidates, or say why none that was made is fit."""
    made = train_detector(config, generator, candidates.images, progress=progress)
    if lacking := unfit(made.evaluation):
        return lacking
    write_json(run.folder("generate") / DETECTOR, made.to_json())
    return ""


def _with_mix(settings: GenerateConfig, target: Target, independent: Sequence[str], cells: Cells) -> GenerateConfig:
    if problem := target_problem(cells, target):
        raise UsageError(f"--target {problem}.")
    if problem := independent_problem(cells, independent):
        raise UsageError(f"--independent {problem}.")
    wanted = {**settings.target, **{name: dict(shares) for name, shares in target.items()}}
    held = tuple(dict.fromkeys((*settings.independent, *independent)))
    return settings.model_copy(update={"target": wanted, "independent": held})


def draw(generator: Generator, settings: GenerateConfig, *, progress: Progress) -> Candidates:
    """Draw `settings.count` images; equal settings give equal images."""
    layout = generator.cells
    cells = mixed_cells(settings, generator.cell_probabilities, layout)
    seeds = image_seeds(settings.seed, len(cells))
    images = generator.sample(cells, seeds, settings, progress=progress)
    return Candidates(images=to_8_bit(images), labels=layout.labels(cells), seeds=seeds, attributes=layout.values(cells))


def mixed_cells(settings: GenerateConfig, probabilities: NDArray[np.float64], cells: Cells) -> NDArray[np.int64]:
    """Cells in the wanted mix: (count,), in random order, each share met to within one image. probabilities: (cells,), as released."""
    shares = _wanted_shares(settings, probabilities, cells)
    exact = shares / shares.sum() * settings.count
    counts = np.floor(exact).astype(np.int64)
    largest_remainders = np.argsort(-(exact - counts), kind="stable")[: settings.count - int(counts.sum())]
    counts[largest_remainders] += 1
    drawn = np.repeat(np.arange(len(cells), dtype=np.int64), counts)
    return np.random.default_rng(settings.seed).permutation(drawn)


def _wanted_shares(settings: GenerateConfig, probabilities: NDArray[np.float64], cells: Cells) -> NDArray[np.float64]:
    equal = {name: 1 / len(cells.classes) for name in cells.classes}
    target = {LABEL: equal, **settings.target} if settings.label_mix == "balanced" else settings.target
    if not cells.attributes and not settings.target:  # no attribute, so nothing is independent either
        return np.array(list(equal.values())) if target else np.asarray(probabilities, dtype=np.float64)
    return fit_shares(cells, np.asarray(probabilities, dtype=np.float64), target, independent=settings.independent)


def cell_rows(generator: Generator, candidates: Candidates) -> tuple[CellRow, ...]:
    """One row for each cell: how many patients it has as released with noise, and how many images were drawn."""
    layout = generator.cells
    drawn = np.bincount(layout.index(candidates.labels, candidates.conditions()), minlength=len(layout))
    return tuple(
        CellRow(name=layout.name(cell), noisy_patients=round(float(count), 1), stddev=round(generator.count_stddev, 1), images=int(number))
        for cell, (count, number) in enumerate(zip(generator.moments.counts, drawn, strict=True))
    )


def small_cells(rows: tuple[CellRow, ...]) -> tuple[str, ...]:
    """A line for each drawn cell whose noisy count is below FEWEST_PATIENTS: its images mostly show what its label looks like."""
    return tuple(
        f"{row.name}: {row.images} images from {row.noisy_patients:.0f} patients (released, noise ± {row.stddev:.0f}); "
        f"below {FEWEST_PATIENTS} they mostly show their label"
        for row in rows
        if row.images and row.noisy_patients < FEWEST_PATIENTS
    )


def image_seeds(seed: int, count: int) -> NDArray[np.uint64]:
    """One 64-bit seed per image, the same for image i whatever the count."""
    digests = (hashlib.sha256(f"dpsynth image {seed} {index}".encode()).digest()[:8] for index in range(count))
    return np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.uint64)
