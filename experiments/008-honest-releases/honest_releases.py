"""How often is the release of an honest run stopped, from its training under privacy to the gate?

    python experiments/008-honest-releases/honest_releases.py [--runs 20]
    python experiments/008-honest-releases/honest_releases.py --table      # of results.json

The quickstart's settings by the product's command line, again and again, each with coins, noise, keys and ledger of its own; weights that
were pre-trained on public images once are used by all. Each run's verdicts are in results.json; runs are added to those that are there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from results import known, once  # noqa: E402 (an experiment is a script; what several share lies one folder up)
from verbs import dpsynth, train_and_generate  # noqa: E402

from dpsynth.artifacts import read_json  # noqa: E402
from dpsynth.checks.statistics import clopper_pearson  # noqa: E402
from dpsynth.quickstart import CONFIG  # noqa: E402

DECIDED = (0, 3)  # exit statuses of a verb that did what it is for


def run(home: Path, cache: Path) -> dict[str, Any]:
    """One run: the outcome and p-value of each check, whether the gate released, and what it said."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    config = yaml.safe_load(CONFIG)
    (home / "config.yaml").write_text(yaml.safe_dump({**config, "pretrain": {**config["pretrain"], "cache": str(cache)}}), encoding="utf-8")
    train_and_generate(home, epsilon=10, delta=1e-5)  # as the quickstart
    checked = dpsynth(home, "check", "run", "--ledger", "ledger.jsonl", allowed=DECIDED)
    dpsynth(home, "key", "keys")
    gate = dpsynth(home, "release", "run", "out", "--key", "keys/signing.key", "--ledger", "ledger.jsonl", allowed=DECIDED)
    verdicts = read_json(home / "run" / "check" / "verdicts.json")["verdicts"]
    return {
        "released": (home / "out").is_dir(),
        "gate": " ".join(gate.output.split())[-600:] if not (home / "out").is_dir() else "",
        "check, CPU seconds": round(checked.cpu),
        "outcomes": {verdict["check"]: verdict["outcome"] for verdict in verdicts},
        "p": {verdict["check"]: verdict["p_value"] for verdict in verdicts if verdict.get("p_value") is not None},
    }


def table(path: Path) -> str:
    """By check, how often each outcome came."""
    runs = list(known(path).values())
    if not runs:
        return "No run yet."
    released = sum(run["released"] for run in runs)
    low, high = clopper_pearson(released, len(runs), 0.95)
    words = ("pass", "flag", "inconclusive", "fail")
    rows = [f"Released: {released} of {len(runs)} (95 % interval {low:.2f} to {high:.2f}).", ""]
    rows += ["| check | " + " | ".join(words) + " |", "|---" * (len(words) + 1) + "|"]
    for check in dict.fromkeys(check for run in runs for check in run["outcomes"]):
        counts = [sum(run["outcomes"].get(check) == word for run in runs) for word in words]
        rows.append(f"| {check} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(rows)


def main() -> None:
    """Run what is missing in results.json, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path("runs/008"))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    path, work = HERE / "results.json", arguments.work.resolve()
    for number in range(0 if arguments.table else arguments.runs):
        once(path, f"quickstart/{number}", lambda n=number: run(work / str(n), work / "pretrained"))  # type: ignore[misc]
        shutil.rmtree(work / str(number), ignore_errors=True)
    print(table(path))


if __name__ == "__main__":
    main()
