"""How often do the privacy checks accuse without cause, what do they see at 100, 400 and 1,000 pool patients, and what do others see?

    python experiments/006-false-alarms-and-power/power.py [--repetitions 200] [--power-repetitions 20] [--pools 100 400 1000]
    python experiments/006-false-alarms-and-power/power.py --table        # of results.json
    pip install --no-deps domias==0.0.5                                   # before, for the rows of that library

Patients are points of a mixture that stands for features (thumbnails and encoder features alike), so that hundreds of repetitions take
minutes: half as many patients as the pool are always trained on, the pool by fair coins. Label, sex and site are coins of their own.
Every check runs as it is, Holm included; attributes, which the usual policy does not require, at its own level.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsynth.checks.attributes import attributes
from dpsynth.checks.copying import copying
from dpsynth.checks.evidence import Evidence, Features
from dpsynth.checks.family import decide_family
from dpsynth.checks.groups import groups
from dpsynth.checks.membership import membership, pool_scores
from dpsynth.checks.search import Approaches, Nearest
from dpsynth.checks.statistics import nearest, pairwise
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from points import NULL, PLANTED, Hospital, People  # noqa: E402 (an experiment is a script)
from results import known, once  # noqa: E402 (what several share lies one folder up)

Array = NDArray[np.float64]
GATE = GateConfig()


FAMILY = ("membership", "copying", "groups")


def approaches_of(queries: Array, real: Array, own: NDArray[np.int64] | None = None) -> Approaches:
    """The search for copies on points."""
    distances = pairwise(queries, real)
    if own is not None:
        distances[np.arange(len(queries)), own] = np.inf
    three = np.partition(distances, (0, 1, 2), axis=1)[:, :3]
    return Approaches.among(Nearest(patient=distances.argmin(axis=1), distances=three), np.arange(len(queries)))


def checked(hospital: Hospital, synthetic: People, rng: np.random.Generator) -> dict[str, Verdict]:
    """The verdicts of the checks that see images, after Holm over the whole family."""
    drawn, training, control = synthetic.images("s"), hospital.training.points, hospital.control.points
    evidence = Evidence(
        synthetic=drawn.images,
        synthetic_labels=drawn.labels,
        training=hospital.training.images("t"),
        control=hospital.control.images("c"),
        in_pool=hospital.in_pool,
        epsilon=10.0,
        delta=1e-5,
        selfcheck={},
        canaries={},
        accounting_problems=(),
        ledger_problems=(),
        uses_sgd=False,
        synthetic_attributes={name: np.array([own[name] for own in drawn.attributes]) for name in ("sex", "site")},
    )
    real = np.concatenate([training, control])
    features = Features(
        synthetic=synthetic.points,
        training=training,
        control=control,
        synthetic_thumbnails=synthetic.points,
        training_thumbnails=training,
        control_thumbnails=control,
        synthetic_approaches=approaches_of(synthetic.points, real),
        real_approaches=approaches_of(real[evidence.pool], real, evidence.pool),
        encoder="points",
    )
    scores = pool_scores(evidence, features)
    found = [
        membership(evidence, GATE, scores=lambda: scores, rng=rng),
        copying(evidence, features, GATE, rng=rng),
        groups(evidence, features, GATE, scores=lambda: scores, rng=rng),
        attributes(evidence, features, GATE, rng=rng),
    ]
    return {verdict.check: verdict for verdict in decide_family(found, GATE.family_error)}


def usual(real: Array, control: Array, synthetic: Array) -> dict[str, bool]:
    """What people use instead, each with its customary rule, on features of training, control and synthetic images; True: it accuses."""
    to_training = nearest(synthetic, real)[0]
    size = min(len(real), len(control))
    nearer = nearest(synthetic, real[:size])[0] < nearest(synthetic, control[:size])[0]
    held_out = nearest(control, real)[0]
    own = nearest(real, real, own=np.arange(len(real)))[0]
    two_real = np.partition(pairwise(control, real), 1, axis=1)[:, :2]
    two = np.partition(pairwise(synthetic, real), 1, axis=1)[:, :2]
    authentic = float(np.mean(own[nearest(synthetic, real)[1]] < to_training))  # Alaa et al. 2022
    return {
        "distance to closest record, share nearer to training above 0.55": float(nearer.mean()) > 0.55,
        "distance to closest record, 5th percentile below that of held-out patients": bool(
            np.quantile(to_training, 0.05) < np.quantile(held_out, 0.05)
        ),
        "nearest-neighbour distance ratio, 5th percentile below that of held-out patients": bool(
            np.quantile(two[:, 0] / two[:, 1], 0.05) < np.quantile(two_real[:, 0] / two_real[:, 1], 0.05)
        ),
        "absolute threshold, any image nearer than the nearest held-out patient": bool(to_training.min() < held_out.min()),
        "absolute threshold, more than 5 % nearer than 5 % of held-out patients": float(np.mean(to_training < np.quantile(held_out, 0.05)))
        > 0.05,
        "authenticity below 0.5": authentic < 0.5,
    }


def library(real: Array, control: Array, synthetic: Array) -> dict[str, bool]:
    """Attacks of a library as they are (domias 0.0.5, van Breugel et al. 2023), where it is installed: members are training patients, one
    half of the control patients are not, the other half is its reference. It gives an AUC and no rule; 0.55 is ours.
    """
    try:
        from domias.baselines import GAN_leaks, compute_metrics_baseline, kde_baseline
    except ModuleNotFoundError:
        return {}
    half = len(control) // 2
    others, reference = control[:half], control[half:]
    asked = np.concatenate([real[-half:], others])
    inside = np.arange(len(asked)) < half
    density, ratio = kde_baseline(asked, synthetic, reference)
    scores = {"density of synthetic points": density, "DOMIAS density ratio": ratio, "GAN-leaks": GAN_leaks(asked, synthetic)}
    return {f"domias, {name}, AUC above 0.55": compute_metrics_baseline(score, inside)[1] > 0.55 for name, score in scores.items()}


def rates(pool: int, generate: Callable[..., People], repetitions: int, seed: int) -> dict[str, Any]:
    """Share of repetitions in which each check accuses after Holm, with p below 0.05 alone, flags or is silent; and the usual measures."""
    alone, after, screened, others = [], [], [], []
    for repetition in range(repetitions):
        rng = np.random.default_rng([seed, pool, repetition])
        hospital = Hospital.drawn(pool, rng)
        synthetic = generate(hospital, max(500, 2 * pool), rng)
        verdicts = checked(hospital, synthetic, rng)
        alone.append({name: verdict.figures["p"] <= GATE.family_error for name, verdict in verdicts.items()})
        after.append({name: verdicts[name].figures["p after Holm"] <= GATE.family_error for name in FAMILY})
        screened.append({"screening": bool(verdicts["copying"].listed), "family": any(after[-1].values())})
        after[-1]["attributes"] = verdicts["attributes"].outcome is Outcome.FLAG
        points = (hospital.training.points, hospital.control.points, synthetic.points)
        others.append({**usual(*points), **library(*points)})
    stopped = [any(accused.values()) or shown["screening"] for accused, shown in zip(after, screened, strict=True)]
    mean = {name: float(np.mean([row[name] for row in rows])) for rows in (screened, others) for name in rows[0]}
    return {
        "repetitions": repetitions,
        "accuses": {name: float(np.mean([row[name] for row in after])) for name in after[0]},
        "p below 0.05": {name: float(np.mean([row[name] for row in alone])) for name in alone[0]},
        "family": mean["family"],
        "screening shows somebody": mean["screening"],
        "release stopped": float(np.mean(stopped)),
        "usual measures": {name: mean[name] for name in others[0]},
    }


def tables(path: Path) -> str:
    """The two tables of the README."""
    results = known(path)
    rows = ["| generator | pool | membership | copying | groups | family | attributes | screening | stopped |", "|" + "---|" * 9]
    names = [f"{generator}, pool {pool}" for generator in (*NULL, *PLANTED) for pool in (100, 400, 1000)]
    for name in (name for name in names if name in results):
        r = results[name]
        generator, pool = name.rsplit(", pool ", 1)
        cells = [*(r["accuses"][check] for check in FAMILY), r["family"], r["accuses"]["attributes"]]
        cells += [r["screening shows somebody"], r["release stopped"]]
        rows.append(f"| {generator} | {pool} | " + " | ".join(f"{100 * value:.1f} %" for value in cells) + " |")
    at = {generator: results[f"{generator}, pool 400"] for generator in (*NULL, *PLANTED) if f"{generator}, pool 400" in results}
    measures = list(next(iter(at.values()))["usual measures"]) if at else []
    rows += ["", "| at a pool of 400 | " + " | ".join(at) + " |", "|---|" + "---|" * len(at)]
    rows.append("| this gate stops the release | " + " | ".join(f"{100 * r['release stopped']:.0f} %" for r in at.values()) + " |")
    rows += [f"| {m} | " + " | ".join(f"{100 * r['usual measures'][m]:.0f} %" for r in at.values()) + " |" for m in measures]
    return "\n".join(rows)


def main() -> None:
    """Run what is missing in results.json, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--power-repetitions", type=int, default=20)
    parser.add_argument("--pools", type=int, nargs="+", default=[100, 400, 1000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    path = HERE / "results.json"
    if not arguments.table:
        for generators, repetitions in ((NULL, arguments.repetitions), (PLANTED, arguments.power_repetitions)):
            for pool in arguments.pools:
                for name, generate in generators.items():
                    once(path, f"{name}, pool {pool}", lambda g=generate, n=repetitions, p=pool: rates(p, g, n, arguments.seed))  # type: ignore[misc]
    print(tables(path))


if __name__ == "__main__":
    main()
