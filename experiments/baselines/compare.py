"""One table a data set: published methods, written here from their papers, against ours at equal data, epsilon, evaluator and CPU minutes.

    DPSYNTH_DATA=... python experiments/baselines/compare.py --rows pneumonia [--epsilons 1 10] [--methods ...] [--seeds 0 1 2]
    python experiments/baselines/compare.py --rows pneumonia --table

A finished (row, epsilon, method, seed) is not done again. With `--minutes-scale` other than 1 (0.02: does everything still
run?) results go to a folder of their own in the work folder, so that tiny runs never mix with real ones.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dp_cgan import dp_cgan
from dp_feta import dp_feta
from dp_merf import dp_merf
from dpdm import ceiling, dpdm
from private import COUNT, Made, Task, spent
from tutorial_loop import tutorial_loop

from dpsynth.artifacts import RunFolder, read_json, write_json
from dpsynth.config import Config, GateConfig, PretrainConfig, parse_config
from dpsynth.data.candidates import load_candidates, to_8_bit, to_unit_range
from dpsynth.data.cohort import Float32, ImageSet, Int64
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.data.split import split_patients
from dpsynth.progress import silent
from dpsynth.train.public import public_images

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from measure import data_folder, measured, test_images  # noqa: E402 (an experiment is a script; what several share lies one folder up)
from results import known, mean_and_spread, once  # noqa: E402
from verbs import pretrain_into_cache, train_and_generate  # noqa: E402

DELTA = 1e-5
OWN: dict[str, dict[str, Any]] = {  # what the command line's configuration says beside data, privacy and pre-training
    "moments": {"method": "moments"},
    "ours": {"method": "diffusion"},
    "ours-all": {"method": "diffusion"},
    "ours-votes": {"method": "diffusion", "votes": {"share": 0.05}},
}
DRAWN_AS_MANY = ("ours-all",)  # as the training has patients, in place of COUNT
BASELINES: dict[str, Callable[[Task], Made]] = {
    "dp-merf": dp_merf, "dpdm": dpdm, "dpdm-long": dpdm, "dp-feta": dp_feta, "dp-cgan": dp_cgan, "tutorial": tutorial_loop,
    "ceiling": ceiling,
}  # fmt: skip
WITHOUT_EPSILON = ("real", "ceiling")
METHODS = ("real", "ceiling", *OWN, *(name for name in BASELINES if name != "ceiling"))
COLUMNS = (
    "auc", "balanced_accuracy", "worst_recall", "precision", "recall", "density", "coverage", "fd", "kid", "fd_bands", "kid_bands",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """One data set. declared_patients: public size of what is trained on; public: what the product pre-trains on; steps: of each
    baseline that can do it, for 3 CPU minutes of training."""

    data: dict[str, Any]
    public: Callable[[], dict[str, Any]]
    declared_patients: int
    epsilons: tuple[float, ...]
    steps: dict[str, int]


def other_x_rays() -> dict[str, Any]:
    """1,000 X-rays of adults from other hospitals."""
    return {"source": "raster", "path": str(data_folder() / "nih1000"), "classes": ["normal", "abnormal"], "steps": 2500}


def procedural_organs() -> dict[str, Any]:
    """Nothing but what comes with the product: bodies on dark ground, as organs in crops and masks are."""
    return {"source": "phantom", "anatomies": ["organ"]}


ROWS = {
    "pneumonia": Row(
        data={
            "format": "medmnist", "path": "pneumoniamnist.npz", "name": "PneumoniaMNIST", "unit": "image",
            "classes": ["normal", "pneumonia"], "spatial_shape": [28, 28],
        },
        public=other_x_rays,
        declared_patients=4700,
        epsilons=(1, 10),
        steps={"dp-merf": 850, "dpdm": 90, "dpdm-long": 270, "dp-feta": 60, "dp-cgan": 1500, "tutorial": 225, "ceiling": 480},
    ),
    "kermany": Row(
        data={
            "format": "raster", "path": "kermany_cxr", "name": "paediatric chest X-rays", "unit": "patient",
            "classes": ["normal", "bacteria", "virus"], "spatial_shape": [64, 64],
        },
        public=other_x_rays,
        declared_patients=2500,
        epsilons=(1, 3, 10),
        steps={"dp-merf": 170, "dpdm": 55, "dpdm-long": 165, "dp-feta": 40, "dp-cgan": 440, "tutorial": 210, "ceiling": 300},
    ),
    "adrenal": Row(
        data={
            "format": "medmnist", "path": "adrenalmnist3d.npz", "name": "AdrenalMNIST3D", "unit": "image",
            "classes": ["normal", "hyperplasia"], "spatial_shape": [28, 28, 28], "intensity_range": [0, 1],
        },
        public=procedural_organs,
        declared_patients=1200,
        epsilons=(1, 10),
        steps={"dpdm": 22, "ceiling": 120},
    ),
    "hippocampus": Row(
        data={
            "format": "nifti", "path": "hippocampus", "name": "hippocampus crops", "unit": "patient", "classes": ["hippocampus"],
            "spatial_shape": [32, 48, 32], "mixed_sizes": True, "intensity_range": "each",
        },
        public=procedural_organs,
        declared_patients=100,
        epsilons=(10,),
        steps={"dpdm": 15, "ceiling": 80},
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Split:
    """What every method of a row and seed gets."""

    training: ImageSet
    test: tuple[Float32, Int64]
    public: Float32


def settings(row: str, method: str, epsilon: float, work: Path, *, data_path: Path, scale: float) -> str:
    """What a user would write: data, privacy, and a public set to pre-train on; all else is default."""
    data = {**ROWS[row].data, "path": str(data_path), "declared_patients": ROWS[row].declared_patients}
    public = {**ROWS[row].public(), "cache": str(work / "pretrained")}
    text = {
        **OWN[method],
        "data": {**data, "control_fraction": 0.02},  # of the training patients: nothing is checked here
        "privacy": {"epsilon": epsilon, "delta": DELTA},
        "pretrain": {**public, "steps": max(1, round(public.get("steps", PretrainConfig().steps) * scale))},
        "generate": {"count": ROWS[row].declared_patients if method in DRAWN_AS_MANY else COUNT},
        "gate": {"required": [name for name in GateConfig().required if name != "utility" or len(data["classes"]) > 1]},
        "release": {"formats": []},
    }
    return json.dumps(text, indent=1)  # JSON is YAML


def source_config(row: str, work: Path) -> Config:
    """The configuration that reads all private images of a row."""
    return parse_config(settings(row, "moments", 1, work, data_path=source_path(row, work), scale=1), base=work)


def source_path(row: str, work: Path) -> Path:
    """File or folder of a row's images; where no table says the label because there is but one, a copy by links that says it."""
    source = data_folder() / str(ROWS[row].data["path"])
    if source.is_file() or "label" in table_of(source)[0]:
        return source
    (only,) = ROWS[row].data["classes"]
    return linked(source, [{**line, "label": only} for line in table_of(source)], work / row / "all")


def table_of(folder: Path) -> list[dict[str, str]]:
    """Lines of a folder's table.csv."""
    with (folder / "table.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def linked(source: Path, lines: list[dict[str, str]], folder: Path) -> Path:
    """A folder with links to the images of these lines of a table, and a table that has them alone."""
    for line in lines:
        link = folder / line["file"]
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to((source / line["file"]).resolve())
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return folder


@lru_cache(maxsize=1)
def everything(row: str, work: Path) -> tuple[ImageSet, Float32]:
    """All private images of a row before any split, and the public ones at their size."""
    config = source_config(row, work)
    return prepare(read_cohort(config.data), config.data, progress=silent), public_images(config, progress=silent)


def split_of(row: str, seed: int, work: Path) -> Split:
    """Training and test images: the official ones where there are, else a fifth of the patients by the seed's coin is for testing."""
    images, public = everything(row, work)
    if ROWS[row].data["format"] == "medmnist":
        return Split(training=images, test=test_images(source_config(row, work), images), public=public)
    split = split_patients(images, control_fraction=0.2, key=hashlib.sha256(f"baselines {row} {seed}".encode()).digest())
    return Split(training=split.training, test=(split.control.images, split.control.labels), public=public)


def training_folder(row: str, split: Split, seed: int, work: Path) -> Path:
    """Where the command line finds the training patients of the split, and nobody else."""
    source = source_path(row, work)
    if source.is_file():
        return source
    wanted = set(split.training.patient_ids)
    lines = [line for line in table_of(source) if line["patient_id"] in wanted]
    return linked(source, lines, work / row / f"training-{seed}")


def by_command_line(row: str, method: str, epsilon: float, seed: int, split: Split, work: Path, scale: float) -> dict[str, Any]:
    """Ledger, train, generate as a user does; images.npz and the facts of the run."""
    home = work / f"{row}-{epsilon:g}" / f"{method}-{seed}"
    home.mkdir(parents=True, exist_ok=True)
    text = settings(row, method, epsilon, work, data_path=training_folder(row, split, seed, work), scale=scale)
    (home / "config.yaml").write_text(text, encoding="utf-8")
    config = parse_config(text, base=home)
    start = time.process_time()
    if config.method == "diffusion":
        pretrain_into_cache(config, split.public)
    pretraining = time.process_time() - start
    training, drawing = train_and_generate(home, epsilon=epsilon, delta=DELTA)
    seconds = {"pretraining": pretraining, "training": training.cpu, "rest": drawing.cpu}
    run = RunFolder.open(home / "run")
    candidates = load_candidates(run)
    np.savez_compressed(home / "images.npz", images=candidates.images, labels=candidates.labels)
    return {"seconds": seconds, "epsilon": read_json(run.path / "train" / "guarantee.json")["accounting"]["pld"]}


def by_paper(row: str, method: str, epsilon: float, seed: int, split: Split, work: Path, scale: float) -> dict[str, Any]:
    """One baseline; images.npz and the facts of the run."""
    home = work / f"{row}-{epsilon:g}" / f"{method}-{seed}"
    home.mkdir(parents=True, exist_ok=True)
    steps = max(2, round(ROWS[row].steps[method] * scale))
    task = Task(
        training=split.training, public=split.public, epsilon=epsilon, delta=DELTA,
        declared_patients=ROWS[row].declared_patients, seed=seed, steps=steps,
    )  # fmt: skip
    made = BASELINES[method](task)
    np.savez_compressed(home / "images.npz", images=to_8_bit(made.images), labels=made.labels)  # 8 bits, as ours leave
    found = spent(made.mechanisms, DELTA)
    return {"seconds": made.seconds, "epsilon": found if math.isfinite(found) else "inf", "steps": steps}


def one_run(row: str, method: str, epsilon: float, seed: int, work: Path, scale: float) -> dict[str, Any]:
    """Train, draw, measure. Images that a killed run left behind are measured, not made again."""
    split, rng = split_of(row, seed, work), np.random.default_rng(seed)
    if method == "real":
        training = split.training
        return {"figures": measured(training.images, training.labels, training, split.test, rng, seed, real=True), "seconds": {}}
    home = work / f"{row}-{epsilon:g}" / f"{method}-{seed}"
    if not (home / "facts.json").exists():
        make = by_command_line if method in OWN else by_paper
        write_json(home / "facts.json", make(row, method, epsilon, seed, split, work, scale))
    with np.load(home / "images.npz", allow_pickle=False) as arrays:
        images, labels = to_unit_range(arrays["images"]), arrays["labels"]
    return {**read_json(home / "facts.json"), "figures": measured(images, labels, split.training, split.test, rng, seed)}


def table(results: dict[str, Any], row: str) -> str:
    """Mean and standard deviation over the seeds, in Markdown."""
    head = ("method", "epsilon", "seeds", *COLUMNS, "training, CPU s", "rest, CPU s")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for epsilon in ("inf", *(f"{value:g}" for value in ROWS[row].epsilons)):
        for method in METHODS:
            runs = [result for name, result in results.items() if name.startswith(f"{row}-{epsilon}/{method}/")]
            if runs:
                cells = [_cell([run["figures"].get(column, math.nan) for run in runs]) for column in COLUMNS]
                times = [_seconds([run["seconds"].get(stage, math.nan) for run in runs]) for stage in ("training", "rest")]
                lines.append("| " + " | ".join((method, epsilon, str(len(runs)), *cells, *times)) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    return "" if np.isnan(values).all() else mean_and_spread(values, 1 if np.mean(values) >= 10 else 3)


def _seconds(values: list[float]) -> str:
    return "" if np.isnan(values).all() else f"{np.mean(values):.0f}"


def wanted_runs(rows: list[str], methods: list[str], epsilons: list[float] | None, seeds: list[int]) -> list[tuple[str, str, float, int]]:
    """(row, method, epsilon, seed) of each run; what knows no epsilon is run once, what cannot do a row (volumes) not there."""
    return [
        (row, method, epsilon, seed)
        for seed in seeds
        for row in rows
        for method in methods
        if method == "real" or method in OWN or method in ROWS[row].steps
        for epsilon in ((math.inf,) if method in WITHOUT_EPSILON else epsilons or ROWS[row].epsilons)
    ]


def main() -> None:
    """Run what is wanted and not finished; results are written after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", "--table-name", nargs="+", choices=ROWS, default=list(ROWS), help="Data sets, one table each.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epsilons", nargs="+", type=float, help="Default: those of the row.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Which repetitions.")
    parser.add_argument("--work", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--minutes-scale", type=float, default=1.0, help="Multiplies all steps.")
    parser.add_argument("--table", action="store_true", help="Print the tables of the results and do nothing else.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # CPU seconds mean the same for every method
    work, scale = arguments.work.resolve(), arguments.minutes_scale
    if scale != 1:
        work = work / f"scale-{scale:g}"
    path = (HERE if scale == 1 else work) / "results.json"

    if not arguments.table:
        for row, method, epsilon, seed in wanted_runs(arguments.rows, arguments.methods, arguments.epsilons, arguments.seeds):
            once(path, f"{row}-{epsilon:g}/{method}/{seed}", partial(one_run, row, method, epsilon, seed, work, scale))
    for row in arguments.rows:
        print(f"\n{row}\n\n{table(known(path), row)}")


if __name__ == "__main__":
    main()
