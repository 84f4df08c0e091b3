"""What do the measures that people use see of copied images, and how often do they cry wolf, beside this gate? On images, with the encoder.

    python experiments/006-false-alarms-and-power/beside.py [--only procedural real] [--repetitions 50]
    python experiments/006-false-alarms-and-power/beside.py --table        # of results.json
    pip install --no-deps domias==0.0.5                                    # before, for the rows of that library

Hospitals as in images.py: 200 patients without coins, a pool of 400, 800 synthetic images. The honest ones draw other patients, or moments
at epsilon 10. The others are the first of these with one image of each of twenty training patients put in place of others, changed in
one way. The usual measures look at the features that the checks use.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpsynth.data.cohort import Float32, ImageSet, Int64

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1] / "tests"
sys.path[:0] = [str(HERE.parent), str(HERE), str(TESTS), str(TESTS / "attacks"), str(TESTS / "checks")]

from images import GATE, GENERATED, GENERATORS, POPULATIONS, World, judged, population, split  # noqa: E402 (scripts, no package)
from power import usual  # noqa: E402
from results import by_group, known, once  # noqa: E402
from test_copying_generators import FIFTY  # type: ignore[import-not-found]  # noqa: E402

COPIED, COPYABLE, AT_ONCE = 20, 500, 10
BLENDED = "blended 70/30 with another"
CHANGES = ("as they are", "flipped", "shifted by 2 pixels", "turned by 3 degrees", "shrunk to 0.9", "with gamma 1.3", "with noise", BLENDED)
OURS = "this gate stops the release"


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
    ours = {
        "this gate accuses (family)": any(accused),
        "this gate shows somebody to a person": bool(verdicts["copying"].listed),
        OURS: any(accused) or bool(verdicts["copying"].listed),
    }
    encoded = world.encoded
    return {**ours, **usual(encoded[training], encoded[control], encoded[synthetic])}


def copies(world: World, training: Int64, case: str, rng: np.random.Generator) -> Int64:
    """Rows among the queries of the changed images of COPIED training patients."""
    rows = rng.permutation(training[training < COPYABLE])[:COPIED]
    return np.asarray(world.patients.num_patients + GENERATED + CHANGES.index(case) * COPYABLE + rows)


def shares(world: World, case: str, repetitions: range, seed: int) -> dict[str, Any]:
    """In how many repetitions each accuses."""
    found = [seen(world, case, np.random.default_rng([seed, repetition])) for repetition in repetitions]
    return {"repetitions": len(found), **{name: sum(one[name] for one in found) for name in found[0]}}


def table(path: Path) -> str:
    """The table of the README: one a population, a column a case."""
    lines: list[str] = []
    for name in POPULATIONS:
        groups = by_group({key: result for key, result in known(path).items() if key.startswith(f"beside, {name}, ")})
        if not groups:
            continue
        cases = [group.split(", ", 2)[2] for group in groups]
        lines += ["", f"| {name} | " + " | ".join(cases) + " |", "|---" * (len(cases) + 1) + "|"]
        for rule in (rule for rule in next(iter(groups.values()))[0] if rule != "repetitions"):
            cells = [f"{sum(part[rule] for part in parts)} of {sum(part['repetitions'] for part in parts)}" for parts in groups.values()]
            lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing in results.json, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=POPULATIONS, default=list(POPULATIONS))
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    path = HERE / "results.json"
    torch.manual_seed(0)
    starts = range(0, arguments.repetitions, AT_ONCE)
    for name in [] if arguments.table else arguments.only:
        wanted = [(f"beside, {name}, {case}/{start}", case, start) for case in (*GENERATORS, *CHANGES) for start in starts]
        missing = [part for part in wanted if part[0] not in known(path)]
        world = World.of(patients := population(name), planted(patients)) if missing else None
        for key, case, start in missing:
            span = range(start, start + AT_ONCE)
            once(path, key, lambda w=world, c=case, s=span: shares(w, c, s, arguments.seed))  # type: ignore[misc]
    print(table(path))


if __name__ == "__main__":
    main()
