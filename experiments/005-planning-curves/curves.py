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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpsynth.artifacts import RunFolder, read_json, write_json
from dpsynth.config import parse_config
from dpsynth.data.candidates import load_candidates, to_unit_range
from dpsynth.data.cohort import Float32, ImageSet, Int64
from dpsynth.expectations import PATH, Expectation
from dpsynth.progress import silent
from dpsynth.train.public import public_images

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from hospitals import DELTA, private_and_test, settings  # noqa: E402 (an experiment is a script; what several share lies one folder up)
from measure import measured  # noqa: E402
from results import by_group, known, mean_and_spread, once  # noqa: E402
from verbs import pretrain_into_cache, train_and_generate  # noqa: E402

COUNT = 1500
REFERENCE = 5000  # people that images are measured against, the same for all sizes
FIGURES = ("auc", "precision", "recall", "coverage", "kid", "kid_bands")


def evaluator(work: Path) -> tuple[ImageSet, tuple[Float32, Int64]]:
    """People of the private hospital that every run is measured against, and others with labels."""
    return private_and_test(parse_config(json.dumps(settings(patients=REFERENCE, epsilon=1, count=COUNT, work=work)), base=work))


def one_run(patients: int, epsilon: float, seed: int, work: Path) -> dict[str, Any]:
    """Ledger, train, generate by the command line; figures, CPU and wall seconds."""
    home = work / f"{patients}-{epsilon:g}-{seed}"
    home.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings(patients=patients, epsilon=epsilon, count=COUNT, work=work))  # JSON is YAML
    (home / "config.yaml").write_text(text, encoding="utf-8")
    config = parse_config(text, base=home)
    if not (home / "facts.json").exists():
        pretrain_into_cache(config, public_images(config, progress=silent))
        training, drawing = train_and_generate(home, epsilon=epsilon, delta=DELTA)
        facts = {"trained": config.diffusion.trainable, "training": training.cost(), "drawing": drawing.cost()}
        write_json(home / "facts.json", facts)
    candidates = load_candidates(RunFolder.open(home / "run"))
    private, test = evaluator(work)
    rng = np.random.default_rng(seed)
    figures = measured(to_unit_range(candidates.images), candidates.labels, private, test, rng, seed)
    return {**read_json(home / "facts.json"), "figures": figures}


def real_figures(seed: int, work: Path) -> dict[str, Any]:
    """Real against real."""
    private, test = evaluator(work)
    return {"figures": measured(private.images, private.labels, private, test, np.random.default_rng(seed), seed, real=True)}


def table(results: dict[str, Any]) -> str:
    """Mean and standard deviation over the seeds, in Markdown."""
    head = ("patients", "epsilon", "DP-SGD trains", "seeds", *FIGURES, "training, CPU s", "drawing, CPU s")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, runs in grouped(results).items():
        patients, _, epsilon = name.partition("/")
        cells = [mean_and_spread([run["figures"][figure] for run in runs], 3) for figure in FIGURES]
        costs = [mean_and_spread([run[stage]["cpu"] for run in runs if stage in run], 0) for stage in ("training", "drawing")]
        lines.append("| " + " | ".join((patients, epsilon, runs[0].get("trained", ""), str(len(runs)), *cells, *costs)) + " |")
    return "\n".join(lines)


def grouped(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Runs of the same patients and epsilon, fewest patients first; real against real at the head."""

    def order(name: str) -> list[float]:
        return [] if name == "real" else [float(part) for part in name.split("/")]

    groups = by_group(results)
    return {name: groups[name] for name in sorted(groups, key=order)}


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

    if arguments.write:
        write_expectations(known(path))
        return
    if not arguments.table:
        for seed in arguments.seeds:
            once(path, f"real/{seed}", partial(real_figures, seed, work))
            for patients in arguments.patients:
                for epsilon in arguments.epsilons:
                    once(path, f"{patients}/{epsilon:g}/{seed}", partial(one_run, patients, epsilon, seed, work))
    print(table(known(path)))


if __name__ == "__main__":
    main()
