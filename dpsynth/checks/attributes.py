"""Attribute inference: do the images help to learn a patient's label or attributes because that patient was trained on?

The attacker has a patient's image and the synthetic images with their values, and believes the value of the nearest ones. Score of a
patient for one attribute: log distance to the nearest synthetic image of another value minus log distance to the nearest of the true value,
less the same among all other real patients, which is what can be learned from people like them. In two spaces fixed beforehand, added up.
No score depends on the coins, so flipping the coins again gives the exact null; what is true of people in general helps both sides alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dpsynth.checks.evidence import Bool, Evidence, Features
from dpsynth.checks.family import false_alarms, relied_on
from dpsynth.checks.statistics import (
    auc_interval,
    coin_flip_ranks_p,
    difference_of_rates,
    nearest,
    only_above,
    smallest_detectable_auc,
    standardised,
)
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig

Array = NDArray[np.float64]
Int64 = NDArray[np.int64]
QUESTION = "Do the images help to learn a patient's label or attributes because that patient was trained on?"
LIMITATION = (
    "It is one attacker, who has the patient's whole image and looks at the nearest synthetic images, asked about the label and the "
    "declared attributes alone, on average over the pool. What holds for people like the patient can be learned from any good data and "
    "is no part of this."
)
LABEL = "label"
_FEWEST = 20  # pool patients whose value some synthetic image has


@dataclass(frozen=True, kw_only=True)
class Secret:
    """What an attacker may want to know, as numbers of its values: of each patient, training first, and of each synthetic image."""

    name: str
    real: Int64
    synthetic: Int64


def secrets(evidence: Evidence) -> list[Secret]:
    """The label and every declared attribute that has two values or more among the synthetic images."""
    columns: dict[str, tuple[list[str], list[str]]] = {}
    firsts, classes = evidence.first_rows, evidence.training.classes
    columns[LABEL] = ([classes[int(images.labels[row])] for images, row in firsts], [classes[int(n)] for n in evidence.synthetic_labels])
    for name, values in evidence.synthetic_attributes.items():
        columns[name] = ([images.attributes[row].get(name, "") for images, row in firsts], [str(value) for value in values])
    found = []
    for name, (real, synthetic) in columns.items():
        number = {value: index for index, value in enumerate(sorted({*real, *synthetic}))}
        if len(set(synthetic)) > 1:
            numbers = [np.array([number[value] for value in side], dtype=np.int64) for side in (real, synthetic)]
            found.append(Secret(name=name, real=numbers[0], synthetic=numbers[1]))
    return found


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """scores: by secret, (n,) of the pool, not a number where no synthetic image has the patient's value; right: whether the value of the
    nearest synthetic image is the patient's."""

    scores: Mapping[str, Array]
    right: Mapping[str, Bool]


def guesses(evidence: Evidence, features: Features, wanted: list[Secret]) -> Guesses:
    """What the attacker makes of every patient of the pool."""
    pool = evidence.pool
    spaces = (
        (np.concatenate([features.training, features.control]), features.synthetic),
        (np.concatenate([features.training_thumbnails, features.control_thumbnails]), features.synthetic_thumbnails),
    )
    joint = _cells(np.stack([secret.real for secret in wanted], axis=1), np.stack([secret.synthetic for secret in wanted], axis=1))
    scores = {secret.name: np.zeros(len(pool)) for secret in wanted}
    right: dict[str, Bool] = {}
    for real, synthetic in spaces:
        to_synthetic = _to_cells(real[pool], synthetic, joint.synthetic, len(joint.values))
        to_real = _to_cells(real[pool], real, joint.real, len(joint.values), own=pool)
        for column, secret in enumerate(wanted):
            true = secret.real[pool]
            for_synthetic, for_real = (_evidence(d, joint.values[:, column], true) for d in (to_synthetic, to_real))
            scores[secret.name] += standardised(for_synthetic - np.where(np.isfinite(for_real), for_real, 0.0))
            right.setdefault(secret.name, joint.values[to_synthetic.argmin(axis=1), column] == true)
    return Guesses(scores=scores, right=right)


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """values: (cells, secrets), the combinations that occur; real, synthetic: the cell of each."""

    values: Int64
    real: Int64
    synthetic: Int64


def _cells(real: Int64, synthetic: Int64) -> _Cells:
    values, cell = np.unique(np.concatenate([real, synthetic]), axis=0, return_inverse=True)
    return _Cells(values=values, real=cell.ravel()[: len(real)], synthetic=cell.ravel()[len(real) :])


def _to_cells(queries: Array, references: Array, cells: Int64, number: int, *, own: Int64 | None = None) -> Array:
    """Distance of each query to the nearest reference of every cell, (n, cells); infinite where there is none. own: as in `nearest`."""
    found = np.full((len(queries), number), np.inf)
    for cell in range(number):
        rows = np.flatnonzero(cells == cell)
        if own is None:
            among = np.full(len(queries), -1)
        else:
            place = np.searchsorted(rows, own)
            among = np.where(np.append(rows, -1)[place] == own, place, -1)
        if len(rows) > (own is not None):  # a cell of nobody but the query has nothing to be near to
            found[:, cell] = nearest(queries, references[rows], own=among)[0]
    return found


def _evidence(distances: Array, values: Int64, true: Int64) -> Array:
    """Log distance to the nearest of another value minus that to the nearest of the `true` one (n,). distances: (n, cells)."""
    same = values[None] == true[:, None]
    own, other = (np.where(mask, distances, np.inf).min(axis=1) for mask in (same, ~same))
    known = np.isfinite(own) & np.isfinite(other)
    return np.where(known, np.log(np.where(known, other, 1) + 1e-9) - np.log(np.where(known, own, 1) + 1e-9), np.nan)


def attributes(evidence: Evidence, features: Features, gate: GateConfig, *, rng: np.random.Generator) -> Verdict:
    """Accuses when the coins explain too badly how well some value is told; the largest standardised rank sum over the attributes decides.
    INCONCLUSIVE when too few patients could show anything; PASS when there is nothing to learn."""
    verdict = Verdict.nothing_found(
        "attributes",
        question=QUESTION,
        statistic_name="AUC of how well a value is told, in training against outside",
        limitation=LIMITATION,
        false_alarm_rate=false_alarms("attributes", gate),
    )
    inside, level = evidence.inside, relied_on("attributes", gate)
    wanted = secrets(evidence)
    if not wanted:
        return replace(verdict, reason="no attribute is declared and there is one label: nothing can be learned about a patient")
    found = guesses(evidence, features, wanted)
    tested = [secret.name for secret in wanted if np.isfinite(found.scores[secret.name]).sum() >= _FEWEST]
    unseen = replace(verdict, outcome=Outcome.INCONCLUSIVE)
    if not tested:
        return replace(unseen, reason=f"fewer than {_FEWEST} pool patients have values that synthetic images have")
    p, telling = coin_flip_ranks_p(np.stack([found.scores[name] for name in tested]), inside, rng=rng)
    name = tested[telling]
    known = np.isfinite(found.scores[name])
    ours, theirs = (found.scores[name][known & side] for side in (inside, ~inside))
    if not (len(ours) and len(theirs)):
        return replace(unseen, reason="one side of the pool is empty")
    auc, low, high = auc_interval(ours, theirs, 0.95)
    detectable = smallest_detectable_auc(len(ours), len(theirs), false_alarm_rate=level / len(tested))
    rates = {secret: _rates(found.right[secret], inside) for secret in tested}
    text = f"most for {name}: AUC {auc:.3f} (p {p:.2g}), guessed right {_text(rates[name])}"
    seen = f"an AUC of {detectable:.2f} would have been seen"
    verdict = replace(
        verdict,
        reason=f"no evidence for {', '.join(tested)}; {text}; {seen}",
        statistic=auc,
        interval=(low, high),
        figures={
            "smallest detectable AUC": detectable,
            **{f"{key}, {secret}": value for secret in tested for key, value in rates[secret].items()},
        },
        p_value=p,
        accusation=f"the images tell more about patients who were trained on than about others, {text}; {seen}",
    )
    if detectable > gate.largest_membership_auc:
        few = f"with {min(len(ours), len(theirs))} pool patients a side {only_above(detectable)}"
        return replace(verdict, outcome=Outcome.INCONCLUSIVE, reason=few)
    return verdict


def _rates(right: Bool, inside: Bool) -> dict[str, float]:
    """Right guesses on both sides; the risk (a - c) / (1 - c) of Article 29 Working Party's inference, with a 95 % interval.

    Source: Giomi et al. 2023 (arXiv 2211.10459) for the risk, Newcombe 1998 for the interval of a - c.
    """
    a, m, c, n = (int(value) for value in ((right & inside).sum(), inside.sum(), (right & ~inside).sum(), (~inside).sum()))
    low, high = difference_of_rates((a, m), (c, n), 0.95)
    left = max(1 - c / n, 1 / n)
    return {
        "right guesses, in training": a / m,
        "right guesses, outside": c / n,
        "risk": (a / m - c / n) / left,
        "risk, low": low / left,
        "risk, high": high / left,
    }


def _text(rates: Mapping[str, float]) -> str:
    return f"{rates['right guesses, in training']:.0%} of those in training and {rates['right guesses, outside']:.0%} of the others"
