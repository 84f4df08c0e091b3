"""Two generators of real chest X-rays through all checks: one that must fail, and one that must not.

    python experiments/011-real-runs/real_runs.py --run overfitted [--steps 3000]   # diffusion without privacy on 200 X-rays, 28 px
    python experiments/011-real-runs/real_runs.py --run epsilon-10                  # the release of experiment 001 at epsilon 10
    python experiments/011-real-runs/real_runs.py --table

Needs kermany_cxr (and nih1000 for the second) in the folder that DPSYNTH_DATA names. Results go to results.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpsynth.artifacts import read_json
from dpsynth.checks.evidence import Evidence
from dpsynth.checks.suite import run_checks
from dpsynth.config import Config, DataConfig, GateConfig
from dpsynth.data.cohort import ImageSet
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.data.split import split_patients
from dpsynth.progress import silent

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "baselines")]

from edm import EdmDenoiser, balanced, fit_public  # noqa: E402 (an experiment is a script; what several share lies one folder up)
from measure import data_folder  # noqa: E402
from results import add, known  # noqa: E402
from verbs import dpsynth  # noqa: E402

CLASSES = ("normal", "bacteria", "virus")
PATIENTS, DRAWN, SIDE = 400, 400, 28
PRIVACY = ("accounting", "mechanism", "membership", "copying", "groups")


def first_images(seed: int) -> ImageSet:
    """One image each of so many patients."""
    data = DataConfig(format="raster", path=data_folder() / "kermany_cxr", classes=CLASSES, spatial_shape=(SIDE, SIDE))
    images = prepare(read_cohort(data), Config(data=data).data, progress=silent)
    chosen = images.subset(np.sort(np.random.default_rng(seed).permutation(images.num_patients)[:PATIENTS]))
    firsts = np.array([int(rows[0]) for rows in chosen.rows_of()])
    return ImageSet(
        images=chosen.images[firsts],
        labels=chosen.labels[firsts],
        patients=chosen.patients[firsts],
        patient_ids=chosen.patient_ids,
        classes=chosen.classes,
        attributes=tuple(chosen.attributes[row] for row in firsts),
    )


def overfitted(steps: int, seed: int) -> dict[str, Any]:
    """Half of 400 patients by fair coins, thousands of steps on them without clipping and noise; what the checks of the images say.

    The claim put beside it is epsilon 10, and what the engine would have to prove is left empty: the images alone must give it away.
    """
    split = split_patients(first_images(seed), control_fraction=0.5, key=f"overfitted {seed}".encode().ljust(32))
    start = time.process_time()
    denoiser = EdmDenoiser(split.training.images.shape[1:], len(CLASSES), seed=seed)
    fit_public(denoiser, split.training.images, split.training.labels, steps=steps, seed=seed, augment=False)
    labels = balanced(len(CLASSES), DRAWN)
    images = denoiser.draw(labels, seed)
    seconds = time.process_time() - start
    evidence = Evidence(
        synthetic=images, synthetic_labels=labels, training=split.training, control=split.control, in_pool=split.in_pool,
        epsilon=10.0, delta=1e-5, selfcheck={}, canaries={}, accounting_problems=(), ledger_problems=(), uses_sgd=False,
    )  # fmt: skip
    verdicts = [verdict.to_json() for verdict in run_checks(evidence, GateConfig(), seed=seed, progress=silent)]
    return {
        "steps": steps,
        "training patients": split.training.num_patients,
        "control patients": split.control.num_patients,
        "processor seconds of training and drawing": round(seconds),
        **summary(verdicts, epsilon=10.0),
    }


def epsilon_10(seed: int, work: Path) -> dict[str, Any]:
    """Ledger, train, generate, check and report of kermany-10, as a user would; what a finished step wrote is not made again."""
    home = work / f"seed{seed}"
    home.mkdir(parents=True, exist_ok=True)
    text = (HERE.parent / "001-first-release" / "kermany-10.yaml").read_text(encoding="utf-8").replace("TEXTURE", "false")
    text = text.replace("DATA", str(data_folder())).replace("CACHE", str(work / "pretrained")).replace("METHOD", "diffusion")
    (home / "config.yaml").write_text(text, encoding="utf-8")
    if not (home / "ledger.jsonl").exists():
        dpsynth(home, "ledger", "open", "config.yaml", "--epsilon", "10", "--delta", "1e-5", "--ledger", "ledger.jsonl")
    ledger = ("--ledger", "ledger.jsonl")
    for verb, arguments in (
        ("train", ("config.yaml", "--run", "run", *ledger)),
        ("generate", ("run",)),
        ("check", ("run", *ledger)),
        ("report", ("run", *ledger)),
    ):
        if not (home / "run" / verb / "stage.json").exists():
            dpsynth(home, verb, *arguments)
    claimed = float(read_json(home / "run" / "train" / "guarantee.json")["accounting"]["pld"])
    return summary(read_json(home / "run" / "check" / "verdicts.json")["verdicts"], epsilon=claimed)


def summary(verdicts: Iterable[Mapping[str, Any]], *, epsilon: float) -> dict[str, Any]:
    """What is public of the verdicts, their reasons, which are about X-rays that anybody may have, and lower bounds under the claim."""
    kept = ("outcome", "statistic", "p_value", "lower_bound", "reason")
    by_name = {str(verdict["check"]): {name: verdict[name] for name in kept} for verdict in verdicts}
    return {
        "claimed epsilon": epsilon,
        "lower bounds": {name: verdict["lower_bound"] for name, verdict in by_name.items() if verdict["lower_bound"] is not None},
        "failed": [name for name, verdict in by_name.items() if verdict["outcome"] == "fail"],
        "verdicts": by_name,
    }


def table(path: Path) -> str:
    """Outcome of each check, and the lower bounds under the claim."""
    rows = ["| run | " + " | ".join(PRIVACY) + " | lower bounds on epsilon under the claim |", "|---|" + "---|" * (len(PRIVACY) + 1)]
    for name, result in known(path).items():
        bounds = ", ".join(f"{check} {bound:.2f}" for check, bound in result["lower bounds"].items())
        outcomes = [result["verdicts"][check]["outcome"] for check in PRIVACY]
        rows.append(f"| {name} | " + " | ".join(outcomes) + f" | {bounds} of {result['claimed epsilon']:.2f} |")
    return "\n".join(rows)


def main() -> int:
    """One run, written beside the others; 1 when it did not come out as it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", choices=["overfitted", "epsilon-10"])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/011"))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    path, right = HERE / "results.json", True
    torch.manual_seed(arguments.seed)
    if arguments.run == "overfitted":
        found = overfitted(arguments.steps, arguments.seed)
        add(path, f"overfitted without privacy, {arguments.steps} steps, seed {arguments.seed}", found)
        right = bool({"membership", "copying"} & {*found["failed"]})
    elif arguments.run == "epsilon-10":
        found = epsilon_10(arguments.seed, arguments.work.resolve())
        add(path, f"epsilon 10, seed {arguments.seed}", found)
        right = not {*PRIVACY} & {*found["failed"]} and all(bound <= found["claimed epsilon"] for bound in found["lower bounds"].values())
    print(table(path))
    if not right:
        print("This run did not come out as it must.")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
