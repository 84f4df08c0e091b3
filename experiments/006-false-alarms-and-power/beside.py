"""What do the measures that people use see of copied images, and how often do they cry wolf, beside this gate? On images, with the encoder.

    python experiments/006-false-alarms-and-power/beside.py [--only procedural real] [--repetitions 20]
    python experiments/006-false-alarms-and-power/beside.py --table        # of results.json
    pip install --no-deps domias==0.0.5                                    # before, for the rows of that library

Hospitals as in images.py: 200 patients without coins, a pool of 400, 800 synthetic images. The honest ones draw other patients, or moments
at epsilon 10. The others are the first of these with one image of each of twenty training patients put in place of others, changed in
one way. The usual measures look at the features that the checks use, the library at 16 principal components of them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsynth.data.cohort import Float32, ImageSet, Int64

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1] / "tests"
sys.path[:0] = [str(HERE.parent), str(HERE), str(TESTS), str(TESTS / "attacks"), str(TESTS / "checks")]

from images import GATE, GENERATED, GENERATORS, POPULATIONS, World, asked, judged, run_missing, split  # noqa: E402 (scripts, no package)
from power import library, usual  # noqa: E402
from results import by_group, known  # noqa: E402
from test_copying_generators import FIFTY  # type: ignore[import-not-found]  # noqa: E402

COPIED, COPYABLE, AT_ONCE, COMPONENTS = 20, 500, 10, 16
BLENDED = "blended 70/30 with another"
CHANGES = ("as they are", "flipped", "shifted by 2 pixels", "turned by 3 degrees", "shrunk to 0.9", "with gamma 1.3", "with noise", BLENDED)
CASES = (*GENERATORS, *CHANGES)


def planted(patients: ImageSet) -> Float32:
    """The first COPYABLE patients, changed in each of the ways, one way after the other."""
    images = patients.images[:COPYABLE]
    found = []
    for name in CHANGES:
        changed = 0.7 * images + 0.3 * patients.images[-COPYABLE:] if name == BLENDED else FIFTY[name](images)
        found.append(np.ascontiguousarray(changed, dtype=np.float32))
    return np.concatenate(found)


def seen(world: World, case: str, rng: np.random.Generator) -> dict[str, bool]:
    """Who accuses, at one hospital."""
    hospital, synthetic = world.drawn(case if case in GENERATORS else GENERATORS[0], rng)
    training, control = split(hospital, rng)
    if case in CHANGES:
        synthetic = np.concatenate([copies(world, training, case, rng), synthetic[COPIED:]])
    verdicts = judged(world, training, control, synthetic, rng)
    private = [verdict for name, verdict in verdicts.items() if name != "fidelity"]
    accused = [verdict.figures["p after Holm"] <= GATE.family_error for verdict in private]
    shown = bool(verdicts["copying"].listed)
    ours = {
        "this gate accuses (family)": any(accused),
        "this gate shows somebody to a person": shown,
        "this gate stops the release": any(accused) or shown,
    }
    features = [world.encoded[rows] for rows in (training, control, synthetic)]
    return {**ours, **usual(*features), **library(*along_components(features))}


def along_components(features: list[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """The same along principal components of the synthetic images, which an attacker has: in 1,280 dimensions no density is told."""
    centre = features[-1].mean(axis=0)
    axes = np.linalg.svd(features[-1] - centre, full_matrices=False)[2][:COMPONENTS]
    return [(rows - centre) @ axes.T for rows in features]


def copies(world: World, training: Int64, case: str, rng: np.random.Generator) -> Int64:
    """Rows among the queries of the changed images of COPIED training patients."""
    rows = rng.permutation(training[training < COPYABLE])[:COPIED]
    return np.asarray(world.patients.num_patients + GENERATED + CHANGES.index(case) * COPYABLE + rows)


def shares(world: World, case: str, repetitions: range, seed: int) -> dict[str, Any]:
    """In how many repetitions each accuses."""
    found = [seen(world, case, np.random.default_rng([seed, repetition])) for repetition in repetitions]
    return {"repetitions": len(found), **{name: sum(one[name] for one in found) for name in found[0]}}


def table(path: Path) -> str:
    """The tables of the README: one a population, a column a case; in how many repetitions each accuses."""
    results, lines = by_group(known(path)), []
    for name in POPULATIONS:
        groups = {case: parts for case in CASES if (parts := results.get(f"beside, {name}, {case}"))}
        if not groups:
            continue
        first = next(iter(groups.values()))
        repetitions = sum(part["repetitions"] for part in first)
        lines += ["", f"| {name}, of {repetitions} | " + " | ".join(groups) + " |", "|---" * (len(groups) + 1) + "|"]
        rules = sorted((rule for rule in first[0] if rule != "repetitions"), key=lambda rule: (not rule.startswith("this gate"), rule))
        for rule in rules:
            lines.append(f"| {rule} | " + " | ".join(str(sum(part[rule] for part in parts)) for parts in groups.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing in results.json, print the tables."""
    arguments, path = asked(__doc__, repetitions=20), HERE / "results.json"
    world = lambda patients: World.of(patients, planted(patients))  # noqa: E731
    run_missing(path, "beside", CASES, arguments, at_once=AT_ONCE, world_of=world, count=shares)
    print(table(path))


if __name__ == "__main__":
    main()
