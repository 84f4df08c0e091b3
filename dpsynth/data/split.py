"""Training and control patients, by a keyed coin for each patient; and those whose coin was a fair one: the audit pool.

One number u in [0, 1) for each patient, a function of the run's key and the patient's id alone. u < f: control; f <= u < 2f: in the
pool and trained on; the others are trained on without a coin. So a patient is in the pool with probability 2f, whoever else takes part,
and a patient of the pool is trained on by a fair coin. Why there is one mechanism and no second draw: docs/adr/0015.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsynth.data.cohort import ImageSet
from dpsynth.errors import DataError, SelfCheckFailed


@dataclass(frozen=True, kw_only=True)
class Split:
    """Two sets of patients. A patient on both sides would make every membership test blind, so that is refused."""

    training: ImageSet
    control: ImageSet
    key: bytes
    control_fraction: float

    def __post_init__(self) -> None:
        problems = split_problems(self)
        if problems:
            raise SelfCheckFailed("split: " + "; ".join(problems))

    @property
    def commitment(self) -> str:
        """SHA-256 of key and control fraction, hexadecimal: the ledger notes it before training, so neither the coins nor how many of them
        mean control can be chosen afterwards."""
        return hashlib.sha256(self.key + f"\0{self.control_fraction!r}".encode()).hexdigest()

    @property
    def in_pool(self) -> NDArray[np.bool_]:
        """Which training patients are in the audit pool (num_patients,). All control patients are. ValueError above one half."""
        if self.control_fraction > 0.5:
            raise ValueError(f"Expected a control fraction of at most 0.5 for fair coins, got {self.control_fraction}.")
        return np.array([_coin(self.key, patient_id) < 2 * self.control_fraction for patient_id in self.training.patient_ids])

    def record(self) -> dict[str, Any]:
        """What the site keeps: which patient is where, and the key, so that the split can be made again."""
        return {
            "control_fraction": self.control_fraction,
            "key": self.key.hex(),
            "commitment": self.commitment,
            "training": list(self.training.patient_ids),
            "control": list(self.control.patient_ids),
        }


def split_patients(images: ImageSet, *, control_fraction: float, key: bytes) -> Split:
    """Send each patient to control with probability `control_fraction`, by a coin of the key and the patient id alone.

    Raises DataError when one side stays empty.
    """
    to_control = np.array([_coin(key, patient_id) < control_fraction for patient_id in images.patient_ids])
    if to_control.all() or not to_control.any():
        raise DataError(
            "The coin left no patient for training or none for control: the data set is too small for data.control_fraction. "
            "Add patients or move the fraction towards one half."
        )
    training, control = np.flatnonzero(~to_control), np.flatnonzero(to_control)
    return Split(training=images.subset(training), control=images.subset(control), key=key, control_fraction=control_fraction)


def restore_split(images: ImageSet, record: Mapping[str, Any]) -> Split:
    """The split of a record, on images read again. Raises DataError when the patients differ."""
    split = split_patients(images, control_fraction=float(record["control_fraction"]), key=bytes.fromhex(record["key"]))
    if list(split.training.patient_ids) != record["training"] or list(split.control.patient_ids) != record["control"]:
        raise DataError("The patients of the data set are not those that the run was trained on. Restore the data.")
    return split


def split_problems(split: Split) -> tuple[str, ...]:
    """Why a split is not one by patient; empty when it is."""
    both = set(split.training.patient_ids) & set(split.control.patient_ids)
    return (f"image-level split: {len(both)} patients have images in training and in control",) if both else ()


def _coin(key: bytes, patient_id: str) -> float:
    digest = hmac.new(key, b"split\0" + patient_id.encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
