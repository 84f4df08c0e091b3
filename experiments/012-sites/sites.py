"""How useful are images that 1, 2, 3 or 5 sites train together, beside those of all patients in one place and of each site alone?

    python experiments/012-sites/sites.py --data FOLDER [--seeds 0 1 2]
    python experiments/012-sites/sites.py --table                       # of results.json

Equal epsilon per patient everywhere, patient level. `kermany` splits one data set by patient, evenly and skewed by label; `hospitals`
takes kermany_cxr and nih1000 as two sites that differ, with the labels normal and abnormal. Every arm is a federation with its guards in
this process: pooled is one of one site with all patients, alone one of one site with its own. What is in results.json is not run again.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

from dpsynth.config import GenerateConfig
from dpsynth.data.candidates import to_unit_range
from dpsynth.data.cohort import Float32, Int64
from dpsynth.generate import draw
from dpsynth.model.generator import Generator
from dpsynth.progress import silent
from federated.simulate import run_study

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))

from federations import DELTA, Study  # noqa: E402 (an experiment is a script; what several share lies one folder up)
from measure import utility  # noqa: E402
from partition import Row, declared, linked, sites_of, small_images, without_test  # noqa: E402
from results import by_group, known, mean_and_spread, once  # noqa: E402

KERMANY, NIH = ("normal", "bacteria", "virus"), ("normal", "abnormal")
TWO_LABELS = ("normal", "abnormal")  # that both hospitals can give
TWO = {"bacteria": "abnormal", "virus": "abnormal"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is the same for all arms."""

    data: Path | None
    work: Path
    side: int = 28
    channels: tuple[int, ...] = (32, 64)
    pretrain_steps: int = 2500
    num_phantoms: int = 2000  # from which every site computes the public constants
    count: int = 1500


def images_of(setting: Setting, name: str) -> tuple[Path, tuple[Row, ...], tuple[str, ...]]:
    """Folder, rows and classes of a data set at the setting's size."""
    classes, joined = {"kermany": (KERMANY, {}), "two-labels": (KERMANY, TWO), "nih": (NIH, {}), "phantom": (("normal", "lesion"), {})}[
        name
    ]
    files = {"kermany": "kermany_cxr", "two-labels": "kermany_cxr", "nih": "nih1000"}
    source = None if name not in files or setting.data is None else setting.data / files[name]
    folder = setting.work / "images" / f"{name}-{setting.side}"
    rows = small_images(source, folder, side=setting.side, classes=classes, joined=joined)
    return folder, rows, tuple(dict.fromkeys(joined.get(label, label) for label in classes))


@dataclass(frozen=True, kw_only=True)
class Task:
    """Folders of each site, what they declare, and the test patients by name of the hospital they are of."""

    classes: tuple[str, ...]
    sites: tuple[Path, ...]
    declared: tuple[int, ...]
    pooled: Path
    tests: Mapping[str, tuple[Float32, Int64]]


def task_of(setting: Setting, split: str, seed: int) -> Task:
    """The sites of `DATA-even-3`, `DATA-skewed-3` or `hospitals`, made on disk at the first call."""
    home = setting.work / "sites" / f"{split}-{setting.side}-{seed}"
    if split == "hospitals":
        sources = [images_of(setting, name) for name in ("two-labels", "nih")]
        halves = [without_test(rows, seed) for _, rows, _ in sources]
        parts = [(folder, training) for (folder, _, _), (training, _) in zip(sources, halves, strict=True)]
        tests = {
            name: pixels(folder, test, TWO_LABELS)
            for name, (folder, _, _), (_, test) in zip(("kermany", "nih"), sources, halves, strict=True)
        }
        classes: tuple[str, ...] = TWO_LABELS
    else:
        name, kind, number = split.split("-")
        folder, rows, classes = images_of(setting, name)
        training, test = without_test(rows, seed)
        parts = [(folder, own) for own in sites_of(training, int(number), skewed=kind == "skewed", seed=seed)]
        tests = {name: pixels(folder, test, classes)}
    folders = tuple(linked(folder, home / f"site{index}", own) for index, (folder, own) in enumerate(parts))
    return Task(
        classes=classes, sites=folders, declared=tuple(declared(own) for _, own in parts), pooled=pooled_folder(home, parts), tests=tests
    )  # fmt: skip


def pooled_folder(home: Path, parts: Sequence[tuple[Path, Sequence[Row]]]) -> Path:
    """All sites' images in one folder; files and patients get the number of their source in front where there are several."""
    sources = list(dict.fromkeys(folder for folder, _ in parts))
    folder = home / "pooled"
    if len(sources) == 1:
        return linked(sources[0], folder, [row for _, rows in parts for row in rows])
    named = []
    for number, source in enumerate(sources):
        for row in (row for own, rows in parts if own == source for row in rows):
            named.append(Row(file=f"{number}-{row.file}", patient=f"{number}-{row.patient}", label=row.label))
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / named[-1].file).exists():
                os.link(source / row.file, folder / named[-1].file)
    return linked(folder, folder, named)


def pixels(folder: Path, rows: Sequence[Row], classes: tuple[str, ...]) -> tuple[Float32, Int64]:
    """Test images in [-1, 1] with their labels."""
    from dpsynth.data.raster import read_image

    images = np.stack([read_image(folder / row.file, channels=1).voxels for row in rows]).astype(np.float32) / np.float32(127.5) - 1
    return images, np.array([classes.index(row.label) for row in rows], dtype=np.int64)


def study_of(setting: Setting, task: Task, folders: Sequence[Path], numbers: Sequence[int], epsilon: float, home: Path) -> Study:
    """A federation of these folders by the recipe, which says what DP-SGD trains, if anything."""
    total = sum(numbers)
    layout = {"format": "raster", "classes": list(task.classes), "spatial_shape": [setting.side] * 2}
    public: dict[str, Any] = {
        "steps": setting.pretrain_steps,
        "num_phantoms": setting.num_phantoms,
        "cache": str(setting.work / "pretrained"),
    }
    if setting.data is not None and "nih" not in task.tests:  # where it is not itself private
        public |= {"source": "raster", "path": str(setting.data / "nih1000"), "classes": list(NIH)}
    config = {
        "data": {**layout, "path": str(folders[0]), "declared_patients": total},
        "privacy": {"epsilon": epsilon, "delta": DELTA},
        "pretrain": public,
        "diffusion": {"channels": list(setting.channels)},
    }
    sites = {f"site{index}": (path, number) for index, (path, number) in enumerate(zip(folders, numbers, strict=True))}
    weights = {name: float(number) for name, (_, number) in sites.items()}
    return Study(
        folder=home,
        sites={name: {**layout, "path": str(path), "declared_patients": number} for name, (path, number) in sites.items()},
        settings={"weights": weights, "config": config},
        channels=setting.channels,
        epsilon=epsilon * 1.001,
    )  # fmt: skip


def one_run(setting: Setting, split: str, arm: str, epsilon: float, seed: int, repetition: int) -> dict[str, Any]:
    """Train one arm (together, pooled, alone-K), test a classifier on its images: figures by hospital of the test patients, CPU seconds."""
    task, begun = task_of(setting, split, seed), resource.getrusage(resource.RUSAGE_SELF)
    folders, numbers = {
        "together": (task.sites, task.declared),
        "pooled": ((task.pooled,), (sum(task.declared),)),
    }.get(arm) or ((task.sites[int(arm.split("-")[1])],), (task.declared[int(arm.split("-")[1])],))
    home = setting.work / "runs" / f"{split}-{arm}-{epsilon:g}-{seed}-{repetition}-{setting.side}"
    shutil.rmtree(home, ignore_errors=True)  # of a run that was cut off
    study = study_of(setting, task, folders, numbers, epsilon, home)
    coordinator = study.simulated()
    guarantee = run_study(coordinator, run_path=home / "run")
    drawn = draw(Generator.load(home / "run" / "train"), GenerateConfig(count=setting.count, seed=repetition), progress=silent)
    figures = {}
    for name, (images, labels) in task.tests.items():
        figures[name] = utility(to_unit_range(drawn.images), drawn.labels, (images, labels), len(task.classes), repetition)
    ended = resource.getrusage(resource.RUSAGE_SELF)
    shutil.rmtree(home)
    return {
        "figures": figures, "epsilon": guarantee.epsilon, "trained": coordinator.plan.trainable,
        "declared": list(numbers), "cpu_seconds": ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime,
    }  # fmt: skip


def arms_of(split: str) -> list[str]:
    """Together, pooled, and each site alone."""
    sites = 2 if split == "hospitals" else int(split.split("-")[2])
    return ["pooled", *(["together"] if sites > 1 else []), *(f"alone-{index}" for index in range(sites) if sites > 1)]


def name_of(setting: Setting, split: str, arm: str, epsilon: float, seed: int, repetition: int) -> str:
    """Of a result. Pooled is the same for every division of one data set, and run once."""
    if arm == "pooled" and split != "hospitals":
        split = split.split("-")[0]
    return f"{split}/{setting.side} px/{epsilon:g}/{arm}/{seed}.{repetition}"


def interval(values: Sequence[float]) -> str:
    """Mean with its 95 % interval (Student's t over seeds)."""
    if len(values) < 2:
        return mean_and_spread(list(values), 3)
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):+.3f} ({np.mean(values) - half:+.3f} to {np.mean(values) + half:+.3f})"


def table(results: dict[str, Any]) -> str:
    """AUC of each arm, and paired over seeds: what is lost against pooled, and gained over the site that is best alone."""
    lines = [
        "| sites | size, epsilon | tested on | pooled | together | best site alone | together - pooled | together - best alone |",
        "|" + "---|" * 8,
    ]
    groups = by_group(results)
    for group, runs in groups.items():
        split, side, epsilon, arm = group.split("/")
        if arm != "together":
            continue
        whole = split if split == "hospitals" else split.split("-")[0]
        for hospital in runs[0]["figures"]:
            own, all_pooled = _by_seed(results, group, hospital), _by_seed(results, f"{whole}/{side}/{epsilon}/pooled", hospital)
            pooled = {seed: auc for seed, auc in all_pooled.items() if seed in own}
            names = [f"{split}/{side}/{epsilon}/{arm}" for arm in arms_of(split) if arm.startswith("alone")]
            alone = [_by_seed(results, name, hospital) for name in names]
            best = {seed: max(site[seed] for site in alone) for seed in own if all(seed in site for site in alone)}
            cells = [mean_and_spread(list(values.values()), 3) for values in (pooled, own, best)]
            cells += [interval([own[seed] - other[seed] for seed in own if seed in other]) for other in (pooled, best)]
            lines.append(f"| {split} | {side}, {epsilon} | {hospital} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_seed(results: dict[str, Any], group: str, hospital: str) -> dict[str, float]:
    """AUC of each division, the mean over its repetitions: the best site is then no site that was lucky once."""
    found: dict[str, list[float]] = {}
    for name, run in results.items():
        if name.rsplit("/", 1)[0] == group:
            found.setdefault(name.rsplit("/", 1)[1].partition(".")[0], []).append(run["figures"][hospital]["auc"])
    return {seed: float(np.mean(values)) for seed, values in found.items()}


SPLITS = ("kermany-even-2", "kermany-even-3", "kermany-even-5", "kermany-skewed-2", "kermany-skewed-3", "kermany-skewed-5", "hospitals")


def main() -> None:
    """Run what results.json lacks; it is written after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Folder with kermany_cxr/ and nih1000/ (experiments/README.md).")
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), help="DATA-even-K, DATA-skewed-K, or hospitals.")
    parser.add_argument("--arms", nargs="+", choices=("pooled", "together", "alone"), default=["pooled", "together", "alone"])
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 10.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Which patients are where, and which are for testing.")
    parser.add_argument("--repetitions", type=int, default=1, help="Trainings with fresh noise for each seed.")
    parser.add_argument("--side", type=int, default=28, help="Pixels.")
    parser.add_argument("--pretrain-steps", type=int, default=2500)
    parser.add_argument("--work", type=Path, default=Path("runs/012"))
    parser.add_argument("--table", action="store_true", help="Print the table of results.json and do nothing else.")
    arguments = parser.parse_args()
    path = HERE / "results.json"
    torch.set_num_threads(1)
    if not arguments.table:
        if arguments.data is None or not (arguments.data / "kermany_cxr").is_dir():
            sys.exit("--data: expected a folder with kermany_cxr/ and nih1000/ (sources: experiments/README.md).")
        setting = Setting(
            data=arguments.data.resolve(), work=arguments.work.resolve(), side=arguments.side, pretrain_steps=arguments.pretrain_steps
        )  # fmt: skip
        cells = [
            (split, arm, epsilon, seed, repetition)
            for seed in arguments.seeds
            for epsilon in arguments.epsilons
            for split in arguments.splits
            for arm in arms_of(split)
            if arm.split("-")[0] in arguments.arms
            for repetition in range(arguments.repetitions)
        ]
        for cell in cells:
            once(path, name_of(setting, *cell), partial(one_run, setting, *cell))
    print(table(known(path)))


if __name__ == "__main__":
    main()
