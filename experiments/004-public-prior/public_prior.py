"""What do a public prior, votes and DP-SGD each add? On procedural images alone, so that no choice of the recipe touches private data.

    python experiments/004-public-prior/public_prior.py [--variants ...] [--seeds 0]      # needs no data; `--table` prints results.json

4,700 procedural people are the private set; 1,000 others, seen by another hospital (turned, zoomed, darker, softer), are the public one.
Each variant goes the way of a user: ledger, train, generate. "moments without a prior" takes the noised sums as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from dpsynth.artifacts import RunFolder
from dpsynth.config import Config, parse_config
from dpsynth.data.candidates import load_candidates, to_unit_range
from dpsynth.data.cohort import Float32, ImageSet, Int64
from dpsynth.data.fingerprint import open_ledger
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.generate import generate
from dpsynth.model.moment_release import moment_queries, release_moments
from dpsynth.model.moments import Array, PublicReference, public_reference
from dpsynth.model.wiener import WienerFilter
from dpsynth.plan import planned_mechanisms
from dpsynth.privacy.mechanism import MomentRelease
from dpsynth.privacy.noise import NoiseStream
from dpsynth.progress import silent
from dpsynth.train.public import public_images
from dpsynth.train.run import train

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from hospitals import DELTA, private_and_test, settings  # noqa: E402 (an experiment is a script; what several share lies one folder up)
from measure import measured  # noqa: E402
from results import by_group, known, mean_and_spread, once  # noqa: E402

PATIENTS, COUNT = 4700, 1500
NOTHING: dict[str, Any] = {}
ALL, SMALL, NONE = ({"trainable": which} for which in ("all", "small", "none"))
VARIANTS: dict[str, dict[str, Any]] = {  # settings that differ from the recipe's
    "recipe": NOTHING,
    "recipe with votes": {"votes": {"share": 0.05}},
    "moments and votes": {"diffusion": NONE, "votes": {"share": 0.05}},
    "moments alone, with the net": {"diffusion": NONE},
    "the same without a prior": {"diffusion": NONE, "without": "prior"},
    "the same along all axes": {"diffusion": NONE, "without": "choice of axes"},
    "moments alone, no net": {"method": "moments"},
    "few weights": {"diffusion": {**SMALL, "steps": 40, "learning_rate": 3e-4}, "moments": {"share": 0.8}},
    "all weights, half the steps and rate": {"diffusion": {**ALL, "steps": 40, "learning_rate": 3e-4}, "moments": {"share": 0.55}},
}


def configuration(variant: str, epsilon: float, work: Path) -> Config:
    """What a user would write, with the variant's settings."""
    own = {name: value for name, value in VARIANTS[variant].items() if name != "without"}
    text = {**settings(patients=PATIENTS, epsilon=epsilon, count=COUNT, work=work), **own}
    return parse_config(json.dumps(text), base=work)  # JSON is YAML


@contextmanager
def as_released() -> Iterator[None]:
    """Moments that are the noised sums divided by the noised counts, and nothing else."""

    def means(sums: Any, counts: Any, *_: Any) -> Any:
        return sums / np.maximum(counts, 1)[:, None]

    def covariances(totals: Any, counts: Any, *_: Any, **__: Any) -> Any:
        values, vectors = np.linalg.eigh(totals / np.maximum(counts, 1)[:, None, None])
        return (vectors * np.maximum(values, 1e-6)[:, None, :]) @ vectors.transpose(0, 2, 1)

    with patch("dpsynth.model.moments.pooled_means", means), patch("dpsynth.model.moments.pooled_covariances", covariances):
        yield


@contextmanager
def along_all_axes() -> Iterator[None]:
    """Second moments along all axes, also those that drown in noise."""
    with patch("dpsynth.model.moments._ABOVE_NOISE", 0.0):
        yield


def one_run(variant: str, epsilon: float, seed: int, work: Path) -> dict[str, Any]:
    """Ledger, train, generate, measure. A killed run goes on."""
    home = work / f"{variant}-{epsilon:g}-{seed}".replace(" ", "-").replace(",", "")
    config = configuration(variant, epsilon, work)
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "ledger.jsonl").exists():
        open_ledger(config, path=home / "ledger.jsonl", epsilon=epsilon, delta=DELTA, max_gate_attempts=1, progress=silent)
    start = time.process_time()
    left_out = {"prior": as_released, "choice of axes": along_all_axes}.get(VARIANTS[variant].get("without", ""), nullcontext)
    with left_out():
        train(config, run_path=home / "run", ledger_path=home / "ledger.jsonl", progress=silent)
    trained = time.process_time() - start
    generate(home / "run", progress=silent)
    candidates = load_candidates(RunFolder.open(home / "run"))
    private, test = private_and_test(config)
    return {
        "trained": config.diffusion.trainable if config.method == "diffusion" else "",
        "seconds": {"training": trained, "drawing": time.process_time() - start - trained},
        "figures": measured(to_unit_range(candidates.images), candidates.labels, private, test, np.random.default_rng(seed), seed),
    }


def real_figures(seed: int, work: Path) -> dict[str, Any]:
    """Real against real."""
    config = configuration("recipe", 10, work)
    private, test = private_and_test(config)
    return {"figures": measured(private.images, private.labels, private, test, np.random.default_rng(seed), seed, real=True)}


LEVELS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)


def filter_excess(epsilon: float, work: Path, *, shaping: float, prior: bool, keys: int = 3) -> list[float]:
    """Mean squared error of the moments' linear filter by noise level, as a multiple of that with the private set's own moments."""
    config = configuration("moments alone, no net", epsilon, work)
    private = prepare(read_cohort(config.data), config.data, progress=silent)
    public = public_images(config, progress=silent)
    own = public_reference(private.images, low_frequencies=config.moments.low_frequencies)
    floor = errors(private, own, None, None)
    with patch("dpsynth.model.principal_axes._SHAPING", shaping), nullcontext() if prior else as_released():
        reference = public_reference(public, low_frequencies=config.moments.low_frequencies)
        (release,) = planned_mechanisms(config, delta=DELTA, queries=moment_queries(reference))
        assert isinstance(release, MomentRelease)
        found = [errors(private, reference, release, NoiseStream(key=bytes([key]) * 32)) for key in range(keys)]
    return [float(value) for value in np.mean(found, axis=0) / floor]


def errors(private: ImageSet, constants: PublicReference, mechanism: MomentRelease | None, stream: NoiseStream | None) -> Array:
    """Errors of the filter of the private set's moments, with noise or without."""
    made = release_moments(
        private.images, private.labels, private.patients, num_classes=2, mechanism=mechanism, reference=constants, stream=stream
    )
    return denoising_errors(WienerFilter(made), private.images[:1000], private.labels[:1000])


def denoising_errors(wiener: WienerFilter, images: Float32, labels: Int64) -> Array:
    """Mean squared error at each noise level, (levels,)."""
    generator = torch.Generator().manual_seed(0)
    clean, found = torch.from_numpy(images), []
    for level in LEVELS:
        noisy = clean + level * torch.randn(clean.shape, generator=generator)
        estimate, _ = wiener(noisy, torch.full((len(clean),), level), torch.from_numpy(labels))
        found.append(float((estimate - clean).square().mean()))
    return np.array(found)


def filter_table(work: Path) -> str:
    """In Markdown."""
    lines = ["| epsilon | moments | " + " | ".join(f"noise {level:g}" for level in LEVELS) + " |", "|---|---|" + "---|" * len(LEVELS)]
    for epsilon in (10.0, 1.0):
        for name, shaping, prior in (
            ("equal noise", 0.0, False),
            ("shaped noise", 0.25, False),
            ("shaped noise, public prior", 0.25, True),
        ):
            cells = " | ".join(f"{value:.2f}" for value in filter_excess(epsilon, work, shaping=shaping, prior=prior))
            lines.append(f"| {epsilon:g} | {name} | {cells} |")
    return "\n".join(lines)


COLUMNS = ("auc", "precision", "recall", "coverage", "fd", "kid", "fd_bands", "kid_bands")


def table(results: dict[str, Any]) -> str:
    """Mean and standard deviation over the seeds, in Markdown."""
    lines = ["| variant | epsilon | DP-SGD trains | seeds | " + " | ".join(COLUMNS) + " |", "|---|---|---|---|" + "---|" * len(COLUMNS)]
    for group, runs in by_group(results).items():
        cells = []
        for column in COLUMNS:
            values = [run["figures"][column] for run in runs]
            cells.append(mean_and_spread(values, 0 if np.mean(values) >= 100 else 3))
        variant, epsilon = group.rsplit("/", 1)
        lines.append(f"| {variant} | {epsilon} | {runs[0].get('trained', '')} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the wanted variants; results.json is written after each, and a finished one is not done again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--epsilons", nargs="+", type=float, default=[10.0, 1.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--work", type=Path, default=Path("runs/004"))
    parser.add_argument("--filters", action="store_true", help="Print the errors of the moments' filters (a minute) and do nothing else.")
    parser.add_argument("--table", action="store_true", help="Print the table of results.json and do nothing else.")
    arguments = parser.parse_args()
    path, work = HERE / "results.json", arguments.work.resolve()
    if arguments.filters:
        print(filter_table(work))
        return

    if not arguments.table:
        for seed in arguments.seeds:
            once(path, f"real/inf/{seed}", partial(real_figures, seed, work))
            for epsilon in arguments.epsilons:
                for variant in arguments.variants:
                    once(path, f"{variant}/{epsilon:g}/{seed}", partial(one_run, variant, epsilon, seed, work))
    print(table(known(path)))


if __name__ == "__main__":
    main()
