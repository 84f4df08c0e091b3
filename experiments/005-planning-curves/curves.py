"""What may a hospital of some size expect at some epsilon, and what does a run cost? On procedural images alone.

    python experiments/005-planning-curves/curves.py [--patients 500 1500 5000] [--epsilons 1 10] [--seeds 0]
    python experiments/005-planning-curves/curves.py --table        # of results.json
    python experiments/005-planning-curves/curves.py --write        # results.json to what `dpsynth plan` tells

Every run goes through the command line with the default recipe, and the public images are those of another procedural hospital (1,000;
pre-training is cached and done before the clock starts). A finished (patients, epsilon, seed) is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dpsynth.artifacts import RunFolder, read_json, write_json
from dpsynth.config import Config, parse_config
from dpsynth.data.candidates import load_candidates, to_unit_range
from dpsynth.data.cohort import Float32, ImageSet, Int64
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.expectations import PATH, Expectation
from dpsynth.model.moments import public_reference
from dpsynth.progress import silent
from dpsynth.train.pretrain import pretrained_weights
from dpsynth.train.public import public_images

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from hospitals import PUBLIC_CLASSES, people, public_folder  # noqa: E402 (an experiment is a script; what several share lies one folder up)
from measure import measured  # noqa: E402
from verbs import dpsynth  # noqa: E402

DELTA, COUNT, TEST = 1e-5, 1500, 500
REFERENCE = 5000  # people that images are measured against, the same for all sizes
FIGURES = ("auc", "precision", "recall", "coverage", "kid", "kid_bands")


def configuration(patients: int, epsilon: float, work: Path) -> str:
    """What a user would write."""
    public = {"source": "raster", "path": str(public_folder(work)), "classes": PUBLIC_CLASSES, "steps": 700, "cache": str(work / "cache")}
    text = {
        "method": "diffusion",
        "data": {
            "format": "phantom", "name": "people", "unit": "image", "classes": PUBLIC_CLASSES, "declared_patients": patients,
            "spatial_shape": [28, 28], "control_fraction": 0.02,
            "phantom": {"anatomy": "chest", "num_patients": patients, "max_images": 1, "seed": 77},
        },
        "privacy": {"epsilon": epsilon, "delta": DELTA},
        "pretrain": public,
        "generate": {"count": COUNT},
    }  # fmt: skip
    return json.dumps(text)  # JSON is YAML


def evaluator(work: Path) -> tuple[ImageSet, tuple[Float32, Int64]]:
    """People of the private hospital that every run is measured against, and others with labels."""
    config = parse_config(configuration(REFERENCE, 1, work), base=work)
    images, names = people(TEST, 1077)
    return prepare(read_cohort(config.data), config.data, progress=silent), (
        images,
        np.array([PUBLIC_CLASSES.index(name) for name in names]),
    )


def one_run(patients: int, epsilon: float, seed: int, work: Path) -> dict[str, Any]:
    """Ledger, train, generate by the command line; figures, CPU and wall seconds."""
    home = work / f"{patients}-{epsilon:g}-{seed}"
    home.mkdir(parents=True, exist_ok=True)
    text = configuration(patients, epsilon, work)
    (home / "config.yaml").write_text(text, encoding="utf-8")
    config = parse_config(text, base=home)
    if not (home / "facts.json").exists():
        cached(config)
        if not (home / "ledger.jsonl").exists():
            dpsynth(home, "ledger", "open", "config.yaml", "--epsilon", f"{epsilon:g}", "--delta", f"{DELTA:g}", "--ledger", "ledger.jsonl")
        training = dpsynth(home, "train", "config.yaml", "--run", "run", "--ledger", "ledger.jsonl")
        drawing = dpsynth(home, "generate", "run")
        facts = {"trained": config.diffusion.trainable, "training": training.cost(), "drawing": drawing.cost()}
        write_json(home / "facts.json", facts)
    candidates = load_candidates(RunFolder.open(home / "run"))
    private, test = evaluator(work)
    rng = np.random.default_rng(seed)
    figures = measured(to_unit_range(candidates.images), candidates.labels, private, test, rng, seed)
    return {**read_json(home / "facts.json"), "figures": figures}


def cached(config: Config) -> None:
    """Pre-train into the cache, so that its time is not counted."""
    public = public_images(config, progress=silent)
    pretrained_weights(config, public, public_reference(public, low_frequencies=config.moments.low_frequencies), progress=silent)


def table(results: dict[str, Any]) -> str:
    """Mean and standard deviation over the seeds, in Markdown."""
    head = ("patients", "epsilon", "DP-SGD trains", "seeds", *FIGURES, "training, CPU s", "drawing, CPU s")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, runs in grouped(results).items():
        patients, _, epsilon = name.partition("/")
        cells = [_cell([run["figures"][figure] for run in runs], 3) for figure in FIGURES]
        costs = [_cell([run[stage]["cpu"] for run in runs if stage in run], 0) for stage in ("training", "drawing")]
        lines.append("| " + " | ".join((patients, epsilon, runs[0].get("trained", ""), str(len(runs)), *cells, *costs)) + " |")
    return "\n".join(lines)


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return ""
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def grouped(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Runs of the same patients and epsilon, fewest patients first; real against real at the head."""
    names = sorted(
        {name.rsplit("/", 1)[0] for name in results}, key=lambda name: (name != "real", *map(float, name.split("/")[name == "real" :]))
    )
    return {name: [run for key, run in results.items() if key.rsplit("/", 1)[0] == name] for name in names}


def write_expectations(results: dict[str, Any]) -> None:
    """The means over the seeds into the package."""
    points = []
    for name, runs in grouped(results).items():
        figures = {key: float(np.mean([run["figures"][key] for run in runs])) for key in ("auc", "precision", "coverage")}
        if name == "real":
            real = figures
        else:
            patients, epsilon = name.split("/")
            points.append(Expectation(patients=float(patients), epsilon=float(epsilon), delta=DELTA, **figures).__dict__)
    write_json(PATH, {"made_by": "experiments/005-planning-curves/curves.py --write", "real": real, "points": points})


def main() -> None:
    """Run what is wanted and not finished; results.json is written after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", nargs="+", type=int, default=[500, 1500, 5000, 15000, 50000])
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 10.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/005"))
    parser.add_argument("--table", action="store_true", help="Print the table of results.json and do nothing else.")
    parser.add_argument("--write", action="store_true", help="Write results.json into the package and do nothing else.")
    arguments = parser.parse_args()
    path, work = HERE / "results.json", arguments.work.resolve()

    def known() -> dict[str, Any]:
        return dict(read_json(path)) if path.exists() else {}

    if arguments.write:
        write_expectations(known())
        return
    if not arguments.table:
        for seed in arguments.seeds:
            if f"real/{seed}" not in known():
                private, test = evaluator(work)
                rng = np.random.default_rng(seed)
                figures = measured(private.images, private.labels, private, test, rng, seed, real=True)
                write_json(path, {**known(), f"real/{seed}": {"figures": figures}})
            for patients in arguments.patients:
                for epsilon in arguments.epsilons:
                    name = f"{patients}/{epsilon:g}/{seed}"
                    if name not in known():
                        result = one_run(patients, epsilon, seed, work)
                        write_json(path, {**known(), name: result})  # read again: another process may have finished a run meanwhile
                        print(name, json.dumps(result), flush=True)
    print(table(known()))


if __name__ == "__main__":
    main()
