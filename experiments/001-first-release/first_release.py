"""Real X-rays through the whole command line, then the table: real on real, moments alone, diffusion.

    python experiments/001-first-release/first_release.py [--rows pneumonia-1 pneumonia-10 kermany-10] [--seeds 0 1 2]
    python experiments/001-first-release/first_release.py --table

Needs the data sets of the README in the folder that DPSYNTH_DATA names. Each run opens a ledger of its own, trains, generates, checks and
reports with the same verbs as a user; epsilon in the table is what the report says. Results go to results.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dpsynth.artifacts import RunFolder, read_json, write_json
from dpsynth.config import load_config
from dpsynth.data.candidates import load_candidates, to_unit_range
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.data.split import restore_split
from dpsynth.progress import silent

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from measure import data_folder, measured, test_images  # noqa: E402 (an experiment is a script; what several share lies one folder up)
from results import add, known, mean_and_spread  # noqa: E402
from verbs import dpsynth  # noqa: E402

ROWS = {"pneumonia-1": 1, "pneumonia-10": 10, "kermany-10": 10}
METHODS = ("moments", "diffusion", "moments-texture")


def config_text(row: str, method: str, work: Path) -> str:
    """The row's configuration with its paths and method filled in."""
    text = (HERE / f"{row}.yaml").read_text(encoding="utf-8")
    text = text.replace("DATA", str(data_folder())).replace("CACHE", str(work.parent.parent / "pretrained"))
    return text.replace("METHOD", method.split("-")[0]).replace("TEXTURE", str(method.endswith("texture")).lower())


def one_run(row: str, method: str, seed: int, work: Path) -> dict[str, Any]:
    """Ledger, train, generate, check, report of one run and its figures. A finished run is not done again."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "config.yaml").write_text(config_text(row, method, work), encoding="utf-8")
    if not (work / "ledger.jsonl").exists():
        dpsynth(work, "ledger", "open", "config.yaml", "--epsilon", str(ROWS[row]), "--delta", "1e-5", "--ledger", "ledger.jsonl")
    seconds = {}
    for verb, arguments in (
        ("train", ("config.yaml", "--run", "run", "--ledger", "ledger.jsonl")),
        ("generate", ("run",)),
        ("check", ("run", "--ledger", "ledger.jsonl")),
        ("report", ("run", "--ledger", "ledger.jsonl")),
    ):
        if not (work / "run" / verb / "stage.json").exists():
            seconds[verb] = dpsynth(work, verb, *arguments, allowed=(0, 3)).wall  # a refusal by a check is an answer, not an error
    if seconds:
        write_json(work / "seconds.json", seconds)
    return {**figures(work, seed), "seconds": read_json(work / "seconds.json")}


def figures(work: Path, seed: int) -> dict[str, Any]:
    """All figures of one finished run."""
    run = RunFolder.open(work / "run")
    config = load_config(work / "config.yaml")
    images = prepare(read_cohort(config.data), config.data, progress=silent)
    split = restore_split(images, read_json(run.path / "train" / "site" / "split.json"))
    candidates = load_candidates(run)
    guarantee = read_json(run.path / "train" / "guarantee.json")["accounting"]
    verdicts = {v["check"]: v["outcome"] for v in read_json(run.path / "check" / "verdicts.json")["verdicts"]}
    test = test_images(config, split.control)
    rng = np.random.default_rng(seed)
    synthetic = to_unit_range(candidates.images)
    return {
        "epsilon": {name: guarantee[name] for name in ("pld", "rdp", "second_opinion")},
        "verdicts": verdicts,
        "synthetic": measured(synthetic, candidates.labels, split.training, test, rng, seed),
        "real": measured(split.training.images, split.training.labels, split.training, test, rng, seed, real=True),
    }


COLUMNS = ("auc", "balanced_accuracy", "kid", "precision", "recall", "density", "coverage")


def table(results: dict[str, Any]) -> str:
    """Mean and standard deviation over the seeds, in Markdown; real on real pools the runs of a row."""
    lines = ["| data, epsilon | images | seeds | " + " | ".join(COLUMNS) + " | minutes |", "|---|---|---|" + "---|" * (len(COLUMNS) + 1)]
    for row in dict.fromkeys(name.split("/")[0] for name in results):
        own: dict[str, list[dict[str, Any]]] = {name.split("/")[1]: [] for name in results if name.startswith(row + "/")}
        for name, result in results.items():
            if name.startswith(row + "/"):
                own[name.split("/")[1]].append(result)
        everything = [result for group in own.values() for result in group]
        lines.append(_line(row, "real", [result["real"] for result in everything], []))
        for method in (name for name in METHODS if name in own):
            minutes = [sum(result["seconds"].values()) / 60 for result in own[method]]
            lines.append(_line(row, method, [result["synthetic"] for result in own[method]], minutes))
    return "\n".join(lines)


def _line(row: str, method: str, figures: list[dict[str, float]], minutes: list[float]) -> str:
    cells = []
    for column in COLUMNS:
        values = [figure[column] for figure in figures]
        cells.append(mean_and_spread(values, 3))
    time_taken = f"{max(minutes):.0f}" if minutes else ""
    return f"| {row} | {method} | {len(figures)} | " + " | ".join(cells) + f" | {time_taken} |"


def main() -> None:
    """Run the wanted rows and write results.json after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS[:2]))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Which repetitions.")
    parser.add_argument("--work", type=Path, default=Path("runs/001"))
    parser.add_argument("--table", action="store_true", help="Print the table of results.json and do nothing else.")
    arguments = parser.parse_args()
    path = HERE / "results.json"
    if arguments.table:
        print(table(known(path)))
        return
    for seed in arguments.seeds:
        for row in arguments.rows:
            for method in arguments.methods:
                name = f"{row}/{method}/{seed}"
                work = (arguments.work / row / f"{method}-{seed}").resolve()
                result = one_run(row, method, seed, work)
                add(path, name, result)
                print(name, json.dumps(result["synthetic"]), flush=True)


if __name__ == "__main__":
    main()
