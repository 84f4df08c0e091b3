"""Do labels that are exchanged to meet released class means of descriptors teach a classifier more than those an image was drawn for?

    python experiments/008-exchanged-labels/exchanged_labels.py [--seeds 0 1 2]      # needs no data; `--table` prints results.json

On procedural people alone (4,700 private, 500 for testing), with images drawn from the private moments, as `method: moments` draws them
with texture. Three questions that a label may ask: the finding of the procedural cohort, whose place is random; and what lies along the
first five principal axes of the images, or the fourth to eighth, with some noise. Reported: AUC of the classifier on other people.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpsynth.cells import Cells
from dpsynth.checks.classifier import auc, train_and_predict
from dpsynth.config import parse_config
from dpsynth.data.cohort import Float32, Int64
from dpsynth.model.labelling import release_labelling
from dpsynth.model.moments import moment_queries, public_reference, release_moments, sample_moment_images
from dpsynth.model.noised_sums import NoisedSums
from dpsynth.plan import planned_mechanisms
from dpsynth.privacy.mechanism import MomentRelease
from dpsynth.privacy.noise import NoiseStream
from dpsynth.progress import silent
from dpsynth.train.public import public_images

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from hospitals import CLASSES, DELTA, private_and_test, settings  # noqa: E402 (an experiment is a script; what several share lies one folder up)
from results import by_group, known, mean_and_spread, once  # noqa: E402

PATIENTS, COUNT = 4700, 1500
QUESTIONS = ("finding", "axes 1 to 5", "axes 4 to 8")


def labels_of(question: str, images: Float32, labels: Int64, test: tuple[Float32, Int64]) -> tuple[Int64, Int64]:
    """Labels of the private images and of the test images."""
    if question == "finding":
        return labels, test[1]
    first = int(question.split()[1]) - 1
    flat, others = images.reshape(len(images), -1).astype(np.float64), test[0].reshape(len(test[0]), -1).astype(np.float64)
    centre = flat.mean(axis=0)
    values, axes = np.linalg.eigh(np.cov((flat - centre).T))
    chosen = axes[:, ::-1][:, first : first + 5] / np.sqrt(values[::-1][first : first + 5])
    rng = np.random.default_rng(0)
    weights = rng.normal(size=5)

    def asked(rows: Any) -> Int64:
        score = (rows - centre) @ chosen @ (weights / np.linalg.norm(weights))
        return np.asarray(score + 0.45 * rng.normal(size=len(rows)) > 0.6, dtype=np.int64)

    return asked(flat), asked(others)


def one_run(question: str, epsilon: float, seed: int, work: Path) -> dict[str, float]:
    """AUC with the labels that images were drawn for, and with exchanged ones."""
    text = {**settings(patients=PATIENTS, epsilon=epsilon, count=COUNT, work=work), "method": "moments"}
    config = parse_config(json.dumps(text), base=work)
    private, test = private_and_test(config)
    labels, wanted = labels_of(question, private.images, private.labels, test)
    reference = public_reference(public_images(config, progress=silent), low_frequencies=config.moments.low_frequencies)
    (release,) = planned_mechanisms(config, delta=DELTA, queries=moment_queries(reference, num_labels=len(CLASSES)))
    assert isinstance(release, MomentRelease)
    stream = NoiseStream(key=bytes([seed + 1]) * 32)
    sums = NoisedSums(labels=labels, patients=private.patients, num_classes=2, mechanism=release, stream=stream)
    made = release_moments(private.images, labels, private.patients, num_classes=2, mechanism=release, reference=reference, stream=stream)
    labelling = release_labelling(private.images, sums, counts=made.counts, groups=np.arange(2), public=reference.descriptors)
    drawn = np.random.default_rng(seed).choice(2, size=COUNT, p=made.probabilities).astype(np.int64)
    images = sample_moment_images(made, drawn, np.arange(COUNT, dtype=np.uint64), texture=True)
    exchanged = labelling.labelled(images, drawn, Cells(classes=CLASSES), seed=seed)

    def score(pictures: Float32, names: Int64) -> float:
        return auc(train_and_predict(pictures, names, test[0], classes=2, seed=seed, task="", progress=silent), wanted)

    return {
        "real": score(private.images, labels),
        "as drawn": score(images, drawn),
        "exchanged": score(images, exchanged),
        "changed": float((exchanged != drawn).mean()),
    }


def table(results: dict[str, Any]) -> str:
    """Mean and standard deviation over the seeds, in Markdown."""
    columns = ("real", "as drawn", "exchanged", "changed")
    lines = ["| the label is | epsilon | seeds | real | as drawn | exchanged | share of labels changed |", "|---|---|---|---|---|---|---|"]
    for group, runs in by_group(results).items():
        question, epsilon = group.split("/")
        cells = [mean_and_spread([run[column] for run in runs], 3) for column in columns]
        lines.append(f"| {question} | {epsilon} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what results.json lacks; it is written after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 10.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--work", type=Path, default=Path("runs/008"))
    parser.add_argument("--table", action="store_true", help="Print the table of results.json and do nothing else.")
    arguments = parser.parse_args()
    path, work = HERE / "results.json", arguments.work.resolve()
    torch.set_num_threads(1)
    if not arguments.table:
        for seed in arguments.seeds:
            for epsilon in arguments.epsilons:
                for question in arguments.questions:
                    once(path, f"{question}/{epsilon:g}/{seed}", partial(one_run, question, epsilon, seed, work))
    print(table(known(path)))


if __name__ == "__main__":
    main()
