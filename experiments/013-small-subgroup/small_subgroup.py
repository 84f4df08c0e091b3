"""Does the mix that is drawn help a subgroup that is small among the patients, or whose label follows from the group?

    python experiments/013-small-subgroup/small_subgroup.py [--epsilons 10 1] [--seeds 0 1 2]
    python experiments/013-small-subgroup/small_subgroup.py --table        # of results.json

A hospital of 1,500 procedural patients (28 px, sex an attribute): one in ten is a woman, and every fifth woman but every second man has the
finding. The product's command line trains and draws: as the patients are, half women, sex independent of the label, and both. Reweighing
(Kamiran and Calders 2012) is the first with images repeated by their weights. Classifiers are tested on other people, as many of each sex
and label.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from hospitals import CLASSES, DELTA, settings  # noqa: E402 (an experiment is a script; what several share lies one folder up)
from measure import CLASSIFIERS  # noqa: E402
from results import by_group, known, mean_and_spread, once  # noqa: E402
from verbs import dpsynth, train_and_generate  # noqa: E402

from dpsynth.artifacts import RunFolder  # noqa: E402
from dpsynth.checks.classifier import auc, train_and_predict  # noqa: E402
from dpsynth.data.candidates import load_candidates, to_unit_range  # noqa: E402
from dpsynth.data.cohort import Float32, Int64  # noqa: E402
from dpsynth.data.phantom import phantom_cohort  # noqa: E402
from dpsynth.data.raster import write_png  # noqa: E402
from dpsynth.progress import silent  # noqa: E402

SEXES = ("F", "M")
OF_WOMEN, SICK = 0.1, {"F": 0.2, "M": 0.5}
PATIENTS, DRAWN, TEST_A_CELL = 1500, 1500, 200
MIXES = {
    "as the patients are": (),
    "half women": ("--target", "sex=F:0.5,M:0.5"),
    "sex independent of the label": ("--independent", "sex"),
    "half women, independent": ("--target", "sex=F:0.5,M:0.5", "--independent", "sex"),
}
REWEIGHED = "as the patients are, reweighed"


def people(wanted: dict[tuple[str, int], int], seed: int) -> tuple[Float32, Int64, list[str]]:
    """One image each of so many procedural people of each sex and label, their labels and sexes."""
    left, rows = dict(wanted), []
    cohort = phantom_cohort(
        anatomy="chest", num_patients=40 * max(wanted.values()), max_images=1, spatial_shape=(28, 28), channels=1, classes=CLASSES,
        seed=seed, name="people",
    )  # fmt: skip
    for record in cohort.records:
        cell = (record.attributes["sex"], record.label)
        if left[cell]:
            left[cell] -= 1
            rows.append((record.read().voxels, *cell))
    if any(left.values()):
        sys.exit(f"Too few procedural people: {left} are missing.")
    images = np.stack([voxels for voxels, _, _ in rows]).astype(np.float32) / np.float32(127.5) - 1
    return images, np.array([label for _, _, label in rows]), [sex for _, sex, _ in rows]


def hospital(seed: int) -> tuple[Float32, Int64, list[str]]:
    """The patients."""
    of_sex = {"F": round(OF_WOMEN * PATIENTS), "M": PATIENTS - round(OF_WOMEN * PATIENTS)}
    sick = {sex: round(SICK[sex] * count) for sex, count in of_sex.items()}
    return people({(sex, label): sick[sex] if label else of_sex[sex] - sick[sex] for sex in SEXES for label in (0, 1)}, 300 + seed)


def weights(labels: Int64, sexes: list[str]) -> np.ndarray:
    """Of each image, (n,): P(sex) P(label) / P(sex, label)."""
    women = np.array(sexes) == "F"
    same_sex, same_label = np.where(women, women.mean(), 1 - women.mean()), np.where(labels == 1, labels.mean(), 1 - labels.mean())
    both = np.array([np.mean((women == woman) & (labels == label)) for woman, label in zip(women, labels, strict=True)])
    return np.asarray(same_sex * same_label / both)


def judged(images: Float32, labels: Int64, test: tuple[Float32, Int64, list[str]], seed: int) -> dict[str, float]:
    """AUC among the women and among the men, and of how many of the sick of each the finding is told, means over classifiers."""
    found = []
    for number in range(CLASSIFIERS):
        given = train_and_predict(images, labels, test[0], classes=2, seed=seed + 1000 * number, task="", progress=silent)
        one = {}
        for sex in SEXES:
            rows = np.array(test[2]) == sex
            one[f"AUC {sex}"] = auc(given[rows], test[1][rows])
            one[f"recall {sex}"] = float((given[rows & (test[1] == 1), 1] > given[rows & (test[1] == 1), 0]).mean())
        found.append(one)
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def trained(home: Path, epsilon: float, seed: int) -> None:
    """A run of the product on the hospital's folder, and candidates as the patients are."""
    home.mkdir(parents=True, exist_ok=True)
    images, labels, sexes = hospital(seed)
    (home / "private").mkdir(exist_ok=True)
    rows = ["file,patient_id,label,sex"]
    for index, (image, label, sex) in enumerate(zip(images, labels, sexes, strict=True)):
        write_png(home / "private" / f"{index}.png", image, text={})
        rows.append(f"{index}.png,P{index},{CLASSES[label]},{sex}")
    (home / "private" / "table.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = settings(patients=PATIENTS, epsilon=epsilon, count=DRAWN, work=home.parent)
    data = {name: value for name, value in config["data"].items() if name != "phantom"}
    config["data"] = {**data, "format": "raster", "path": "private", "classes": list(CLASSES), "attributes": {"sex": list(SEXES)}}
    config["pretrain"]["classes"] = list(CLASSES)
    (home / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    train_and_generate(home, epsilon=epsilon, delta=DELTA)


def run(home: Path, epsilon: float, seed: int) -> dict[str, Any]:
    """Every mix of one run."""
    if not (home / "run" / "train" / "stage.json").exists():
        trained(home, epsilon, seed)
    test = people({(sex, label): TEST_A_CELL for sex in SEXES for label in (0, 1)}, 1300 + seed)
    images, labels, _ = hospital(seed)
    found: dict[str, Any] = {"real": judged(images, labels, test, seed)}
    for name, options in MIXES.items():
        dpsynth(home, "generate", "run", *options)
        drawn = load_candidates(RunFolder.open(home / "run"))
        found[name] = judged(to_unit_range(drawn.images), drawn.labels, test, seed)
        if not options:
            heavy = weights(drawn.labels, [str(sex) for sex in drawn.attributes["sex"]])
            rows = np.random.default_rng(seed).choice(len(heavy), 4 * len(heavy), p=heavy / heavy.sum())
            found[REWEIGHED] = judged(to_unit_range(drawn.images)[rows], drawn.labels[rows], test, seed)
    return found


def table(path: Path) -> str:
    """One row a mix."""
    columns = [f"{measure} {sex}" for measure in ("AUC", "recall") for sex in SEXES]
    rows = ["| epsilon | images | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for epsilon, parts in by_group(known(path)).items():
        for name in parts[0]:
            cells = [mean_and_spread([part[name][column] for part in parts], 3) for column in columns]
            rows.append(f"| {epsilon.split()[-1]} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Run what is missing in results.json, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilons", nargs="+", type=float, default=[10.0, 1.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/013"))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    path, work = HERE / "results.json", arguments.work.resolve()
    for epsilon in [] if arguments.table else arguments.epsilons:
        for seed in arguments.seeds:
            home = work / f"{epsilon:g}-{seed}"
            once(path, f"epsilon {epsilon:g}/{seed}", lambda h=home, e=epsilon, s=seed: run(h, e, s))  # type: ignore[misc]
    print(table(path))


if __name__ == "__main__":
    main()
