"""How many patients each label and subgroup has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dpsynth.cells import FEWEST_PATIENTS
from dpsynth.data.cohort import Record

_MOST_VALUES = 12  # of a column that is taken for a subgroup: more are numbers, names or dates


@dataclass(frozen=True, kw_only=True)
class Group:
    """Patients and images of a subgroup; `small` ones are hit hardest by noise and decided on least surely."""

    name: str
    patients: int
    images: int

    @property
    def small(self) -> bool:
        """Whether it has fewer patients than a cell needs."""
        return self.patients < FEWEST_PATIENTS


def groups(records: Sequence[Record], classes: Sequence[str], declared: Sequence[str]) -> list[Group]:
    """Labels; then, each crossed with the label, declared attributes, or without any the columns of few values. Empty crossings too."""
    names = list(declared) or _few_valued(records)
    found = [_group(label, [r for r in records if classes[r.label] == label]) for label in classes]
    for name in names:
        values = sorted({record.attributes.get(name, "") for record in records})
        for label in classes:
            for value in values:
                members = [r for r in records if classes[r.label] == label and r.attributes.get(name, "") == value]
                found.append(_group(f"{label}, {name} {value or '(none)'}", members))
    return found


def _group(name: str, members: Sequence[Record]) -> Group:
    return Group(name=name, patients=len({record.patient_id for record in members}), images=len(members))


def _few_valued(records: Sequence[Record]) -> list[str]:
    values: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for name, value in record.attributes.items():
            values[name].add(value)
    return [name for name, seen in values.items() if 2 <= len(seen) <= _MOST_VALUES]
