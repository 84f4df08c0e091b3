"""results.json of an experiment: each result is written when it is there, whoever else writes meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dpsynth.artifacts import read_json, write_json


def known(path: Path) -> dict[str, Any]:
    """What results.json holds."""
    return dict(read_json(path)) if path.exists() else {}


def add(path: Path, name: str, result: dict[str, Any]) -> None:
    """Write a result beside the others, which are read again: another process may have finished a run meanwhile."""
    write_json(path, {**known(path), name: result})


def once(path: Path, name: str, make: Callable[[], dict[str, Any]]) -> None:
    """Make, write and print a result unless it is there."""
    if name not in known(path):
        result = make()
        add(path, name, result)
        print(name, json.dumps(result), flush=True)


def by_group(results: dict[str, Any]) -> dict[str, list[Any]]:
    """The repetitions of each group, in the order in which groups first appear: a result's name is its group, a slash and a seed."""
    groups: dict[str, list[Any]] = {}
    for name, result in results.items():
        groups.setdefault(name.rsplit("/", 1)[0], []).append(result)
    return groups


def mean_and_spread(values: list[float], digits: int) -> str:
    """A cell of a table: mean and, of several repetitions, standard deviation; nothing of nothing."""
    if not values:
        return ""
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")
