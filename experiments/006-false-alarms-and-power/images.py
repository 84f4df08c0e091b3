"""How often do the checks accuse generators that copy nobody, on images and with the encoder that the product uses?

    python experiments/006-false-alarms-and-power/images.py [--only procedural real] [--repetitions 200]
    python experiments/006-false-alarms-and-power/images.py --table        # of results.json

Two populations at 64 px: procedural patients, and paediatric chest X-rays (Kermany; the first image of each patient; DPSYNTH_DATA). Two
generators: other patients of the population, and moments at epsilon 10 of 1,000 patients who are of no hospital, drawn once. Features,
thumbnails and the distances of the search are computed once; each repetition draws a hospital (200 patients without coins, a pool of
400), its coins and 800 synthetic images anew. Hospitals of one population share patients, so repetitions are not independent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpsynth.checks.copying import copying
from dpsynth.checks.encoders import bundled
from dpsynth.checks.evidence import Evidence, Features
from dpsynth.checks.family import decide_family
from dpsynth.checks.features import encode
from dpsynth.checks.fidelity import fidelity
from dpsynth.checks.groups import groups
from dpsynth.checks.membership import membership, pool_scores
from dpsynth.checks.search import Approaches, Nearest, _whole, apart_from_common  # what `approaches` does, kept for many hospitals
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import Config, DataConfig, GateConfig, PhantomConfig
from dpsynth.data.cohort import Float32, ImageSet, Int64
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.model.moment_release import moment_queries, release_moments
from dpsynth.model.moments import public_reference, sample_moment_images
from dpsynth.model.thumbnails import thumbnails
from dpsynth.privacy.calibrate import mu_of
from dpsynth.privacy.mechanism import MomentRelease
from dpsynth.privacy.noise import NoiseStream
from dpsynth.progress import silent

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from measure import data_folder  # noqa: E402 (an experiment is a script; what several share lies one folder up)
from results import by_group, known, once  # noqa: E402

Array = NDArray[np.float64]
GATE = GateConfig()
SIDE, ALWAYS, POOL, DRAWN, FITTED, GENERATED, EPSILON, DELTA = 64, 200, 400, 800, 1000, 3000, 10.0, 1e-5
POPULATIONS = ("procedural", "real")
GENERATORS = ("other patients", "moments at epsilon 10")
COLUMNS = ("membership", "copying", "groups", "family", "screening", "fidelity")
AT_ONCE = 25  # repetitions that are written together


def population(name: str) -> ImageSet:
    """One image of each patient."""
    shape = (SIDE, SIDE)
    if name == "procedural":
        data = DataConfig(phantom=PhantomConfig(num_patients=3000, max_images=1, seed=11), spatial_shape=shape)
    else:
        classes = ("normal", "bacteria", "virus")
        data = DataConfig(format="raster", path=data_folder() / "kermany_cxr", classes=classes, spatial_shape=shape)
    images = prepare(read_cohort(data), Config(data=data).data, progress=silent)
    firsts = np.array([int(rows[0]) for rows in images.rows_of()])
    return ImageSet(
        images=images.images[firsts],
        labels=images.labels[firsts],
        patients=np.arange(len(firsts)),
        patient_ids=images.patient_ids,
        classes=images.classes,
        attributes=tuple(images.attributes[row] for row in firsts),
    )


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything that repetitions draw from. away: distance of each of `queries` (the patients, then generated images) to each patient."""

    patients: ImageSet
    encoded: Array
    small: Array
    away: Float32
    fitted: Int64

    @classmethod
    def of(cls, patients: ImageSet, planted: Float32 | None = None) -> World:
        """Fit and draw the moments, compute features and distances. planted: further images, the last of the queries."""
        fitted = np.random.default_rng(0).permutation(patients.num_patients)[:FITTED]
        generated = moment_images(patients.subset(np.sort(fitted)))
        queries = np.concatenate([patients.images, generated, *([] if planted is None else [planted])])
        return cls(
            patients=patients,
            encoded=encode(queries, task="", progress=silent),
            small=thumbnails(queries),
            away=distances(queries, patients.images),
            fitted=fitted,
        )

    def drawn(self, generator: str, rng: np.random.Generator) -> tuple[Int64, Int64]:
        """Patients of a hospital, those without coins first, and rows of its synthetic images among the queries."""
        count = self.patients.num_patients
        if generator == "other patients":
            order = rng.permutation(count)
            return order[: ALWAYS + POOL], order[ALWAYS + POOL :][:DRAWN]
        order = rng.permutation(np.setdiff1d(np.arange(count), self.fitted))
        return order[: ALWAYS + POOL], count + rng.permutation(GENERATED)[:DRAWN]


def moment_images(patients: ImageSet) -> Float32:
    """GENERATED images of moments of these patients under noise; the public reference is procedural."""
    public = prepare(
        read_cohort(data := DataConfig(phantom=PhantomConfig(num_patients=500, max_images=1, seed=12), spatial_shape=(SIDE, SIDE))),
        Config(data=data).data,
        progress=silent,
    )
    reference = public_reference(public.images, low_frequencies=12)
    queries = moment_queries(reference)
    moments = release_moments(
        patients.images,
        patients.labels,
        patients.patients,
        num_classes=len(patients.classes),
        mechanism=MomentRelease(noise_multiplier=1 / mu_of(EPSILON, DELTA), queries=queries),
        reference=reference,
        stream=NoiseStream(key=b"false alarms on images".ljust(32)),
    )
    labels = np.arange(GENERATED) % len(patients.classes)
    return sample_moment_images(moments, labels, np.arange(GENERATED).astype(np.uint64), texture=True).astype(np.float32)


def distances(queries: Float32, real: Float32) -> Float32:
    """Of each query to the nearest variant of each real image, (n, m)."""
    whole = apart_from_common(_whole, real)
    left, away = whole(queries, False)[0], []
    for start in range(0, len(real), 100):
        rows, item = whole(real[start : start + 100], True)
        similar = (left @ rows.T).reshape(len(left), -1, int(item.max()) + 1).max(axis=1)
        away.append(np.sqrt(np.maximum(2 - 2 * similar, 0)))
    return np.concatenate(away, axis=1)


def approached(away: Float32) -> Approaches:
    """The nearest of the columns and how much nearer than the others."""
    three = np.partition(away, (0, 1, 2), axis=1)[:, :3].astype(np.float64)
    return Approaches.among(Nearest(patient=away.argmin(axis=1), distances=three), np.arange(len(away)))


def split(hospital: Int64, rng: np.random.Generator) -> tuple[Int64, Int64]:
    """Training, those without coins first, and control patients of a hospital."""
    coins = rng.random(POOL) < 0.5
    return np.concatenate([hospital[:ALWAYS], hospital[ALWAYS:][coins]]), hospital[ALWAYS:][~coins]


def judged(world: World, training: Int64, control: Int64, synthetic: Int64, rng: np.random.Generator) -> dict[str, Verdict]:
    """The checks of one hospital, Holm over the whole family. synthetic: rows of its images among the queries."""
    evidence = Evidence(
        synthetic=np.zeros((DRAWN, 1, 1, 1), dtype=np.float32),
        synthetic_labels=np.zeros(DRAWN, dtype=np.int64),
        training=named(world.patients, training, "t"),
        control=named(world.patients, control, "c"),
        in_pool=np.arange(len(training)) >= ALWAYS,
        epsilon=EPSILON, delta=DELTA, selfcheck={}, canaries={}, accounting_problems=(), ledger_problems=(), uses_sgd=False,
    )  # fmt: skip
    real = np.concatenate([training, control])
    among_people = world.away[np.ix_(real[evidence.pool], real)]
    among_people[np.arange(POOL), evidence.pool] = np.inf
    features = Features(
        synthetic=world.encoded[synthetic],
        training=world.encoded[training],
        control=world.encoded[control],
        synthetic_thumbnails=world.small[synthetic],
        training_thumbnails=world.small[training],
        control_thumbnails=world.small[control],
        synthetic_approaches=approached(world.away[np.ix_(synthetic, real)]),
        real_approaches=approached(among_people),
        encoder=bundled().name,
    )
    scores = pool_scores(evidence, features)
    found = [
        membership(evidence, GATE, scores=lambda: scores, rng=rng),
        copying(evidence, features, GATE, rng=rng),
        groups(evidence, features, GATE, scores=lambda: scores, rng=rng),
        fidelity(features, GATE, rng=rng),
    ]
    return {verdict.check: verdict for verdict in decide_family(found, GATE.family_error)}


def named(patients: ImageSet, rows: Int64, prefix: str) -> ImageSet:
    """These patients in this order, without their pixels."""
    return ImageSet(
        images=np.zeros((len(rows), 1, 1, 1), dtype=np.float32),
        labels=patients.labels[rows],
        patients=np.arange(len(rows)),
        patient_ids=tuple(f"{prefix}{row}" for row in rows),
        classes=patients.classes,
        attributes=tuple(patients.attributes[row] for row in rows),
    )


def counts(world: World, generator: str, repetitions: range, seed: int) -> dict[str, Any]:
    """In how many repetitions a check accuses after Holm, or has p below 0.05 alone, and the screening shows somebody."""
    found = []
    for repetition in repetitions:
        rng = np.random.default_rng([seed, repetition])
        hospital, synthetic = world.drawn(generator, rng)
        found.append(judged(world, *split(hospital, rng), synthetic, rng))
    family = ("membership", "copying", "groups")
    accused = [{name: one[name].figures["p after Holm"] <= GATE.family_error for name in family} for one in found]
    return {
        "repetitions": len(found),
        **{name: sum(one[name] for one in accused) for name in family},
        **{f"{name}, p below 0.05 alone": sum(one[name].figures["p"] <= GATE.family_error for one in found) for name in family},
        "family": sum(any(one.values()) for one in accused),
        "screening": sum(bool(one["copying"].listed) for one in found),
        "images screened": sum(len(one["copying"].listed) for one in found),
        "fidelity": sum(one["fidelity"].outcome is Outcome.FAIL for one in found),
    }


def table(path: Path) -> str:
    """The table of the README."""
    rows = ["| patients | generator | repetitions | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 3) + "|"]
    for name, parts in by_group({name: r for name, r in known(path).items() if name.startswith("images, ")}).items():
        total = sum(part["repetitions"] for part in parts)
        cells = " | ".join(f"{100 * sum(part[column] for part in parts) / total:.1f} %" for column in COLUMNS)
        _, patients, generator = name.split(", ", 2)
        rows.append(f"| {patients} | {generator} | {total} | {cells} |")
    return "\n".join(rows)


def asked(documentation: str | None, *, repetitions: int) -> argparse.Namespace:
    """What the command line wants: populations, repetitions, seed, or the table alone."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=POPULATIONS, default=list(POPULATIONS))
    parser.add_argument("--repetitions", type=int, default=repetitions)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


def run_missing(
    path: Path,
    prefix: str,
    cases: Sequence[str],
    arguments: argparse.Namespace,
    *,
    at_once: int,
    world_of: Callable[[ImageSet], World],
    count: Callable[[World, str, range, int], dict[str, Any]],
) -> None:
    """Count what results.json lacks, `at_once` repetitions together under "PREFIX, POPULATION, CASE/START"."""
    torch.manual_seed(0)
    starts = range(0, arguments.repetitions, at_once)
    for name in [] if arguments.table else arguments.only:
        wanted = [(f"{prefix}, {name}, {case}/{start}", case, start) for start in starts for case in cases]
        missing = [part for part in wanted if part[0] not in known(path)]
        world = world_of(population(name)) if missing else None
        for key, case, start in missing:
            once(path, key, partial(count, world, case, range(start, start + at_once), arguments.seed))  # type: ignore[arg-type]


def main() -> None:
    """Run what is missing in results.json, print the table."""
    arguments, path = asked(__doc__, repetitions=200), HERE / "results.json"
    run_missing(path, "images", GENERATORS, arguments, at_once=AT_ONCE, world_of=World.of, count=counts)
    print(table(path))


if __name__ == "__main__":
    main()
