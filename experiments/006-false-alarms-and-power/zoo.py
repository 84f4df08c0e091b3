"""The attack zoo of tests/attacks/zoo.py, counted: how often is each case caught by the check that is named, and how often its honest twin?

    python experiments/006-false-alarms-and-power/zoo.py [--families copies volumes ...] [--repetitions 20]
    python experiments/006-false-alarms-and-power/zoo.py --table     # runs nothing; --write puts it into docs/checks.md

Hospitals (or keys) are of the seeds 10, 11, ...; five at a time are written, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1] / "tests"
DOCS = HERE.parents[1] / "docs" / "checks.md"
sys.path[:0] = [str(HERE.parent), str(TESTS), str(TESTS / "attacks"), str(TESTS / "checks")]

from results import known, once  # noqa: E402 (an experiment is a script; what several share lies one folder up)
from zoo_cases import FAMILIES, HONEST_TWIN, counts  # type: ignore[import-not-found]  # noqa: E402 (the tests are no package)

FIRST_SEED, AT_ONCE = 10, 5
BEGIN, END = "<!-- zoo: written by experiments/006-false-alarms-and-power/zoo.py -->", "<!-- end of zoo -->"


def tables(path: Path) -> str:
    """One row a case: named check, caught, and how often the honest twin of that check was accused."""
    rows = ["| planted | caught by | caught | honest twin accused |", "|---|---|---|---|"]
    results = known(path)
    for name, family in FAMILIES.items():
        found: list[dict[str, Any]] = [result for key, result in results.items() if key.startswith(f"zoo, {name}/")]
        if not found:
            continue
        total = sum(int(result["repetitions"]) for result in found)
        times = {case: sum(int(result[case]) for result in found) for case in found[0]}
        for case, check in family.cases.items():
            rows.append(f"| {case} | {check} | {times[case]} of {total} | {times[f'{HONEST_TWIN}, {check}']} of {total} |")
    return "\n".join(rows)


def main() -> None:
    """Run what is missing in results.json, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    path = HERE / "results.json"
    for name in [] if arguments.table else arguments.families:
        for start in range(0, min(arguments.repetitions, FAMILIES[name].repetitions), AT_ONCE):
            seeds = range(FIRST_SEED + start, FIRST_SEED + start + AT_ONCE)
            once(path, f"zoo, {name}/{seeds.start}", lambda n=name, s=seeds: {"repetitions": len(s), **counts(n, s)})  # type: ignore[misc]
    print(tables(path))
    if arguments.write:
        before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}\n{tables(path)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
