"""Paired comparison of two classifiers' AUC on the same patients, by formula.

DeLong et al. 1988 by ranks (Sun and Xu 2014), so that time grows as n log n; structural components are added up by patient, since images of
one patient are not independent (Obuchowski 1997). The macro average over classes is linear in the components, so its variance is that of
the patients' sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dpsynth.checks.statistics import structural_components

Array = NDArray[np.float64]
Int64 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """AUC of the first classifier minus that of the second. p: two-sided, of no difference; 1 when there is no variance."""

    estimate: float
    stddev: float
    p: float

    def interval(self, confidence_level: float) -> tuple[float, float]:
        """Normal interval."""
        half = float(stats.norm.ppf((1 + confidence_level) / 2)) * self.stddev
        return self.estimate - half, self.estimate + half


def auc_difference(first: Array, second: Array, labels: Int64, patients: Int64) -> Difference:
    """Compare macro AUCs, one against the rest, of two classifiers' probabilities (n, classes), two classes counting once.

    labels, patients: (n,). Classes absent from `labels` are left out. Raises ValueError when there are not two classes.
    """
    present = np.unique(labels)
    if len(present) < 2:
        raise ValueError(f"Expected images of two classes at least, found {len(present)}.")
    wanted = (1,) if first.shape[1] == 2 else present
    by_patient, estimate = np.zeros(int(patients.max()) + 1), 0.0
    for label in wanted:
        (area, component), (other, of_other) = (_components(side[:, label], labels == label) for side in (first, second))
        estimate += (area - other) / len(wanted)
        by_patient += _by_patient(component - of_other, labels == label, patients) / len(wanted)
    stddev = float(np.sqrt(np.sum(by_patient**2)))
    return Difference(estimate=estimate, stddev=stddev, p=float(2 * stats.norm.sf(abs(estimate) / stddev)) if stddev > 0 else 1.0)


def _components(scores: Array, positive: NDArray[np.bool_]) -> tuple[float, Array]:
    """AUC, and of each image its structural component less the AUC, (n,)."""
    components = np.empty(len(scores))
    components[positive], components[~positive] = structural_components(scores[positive], scores[~positive])
    area = float(components[positive].mean())
    return area, components - area


def _by_patient(components: Array, positive: NDArray[np.bool_], patients: Int64) -> Array:
    """What each patient adds to the AUC's error, (patients,). The small-sample factors are those of Obuchowski 1997 but for the term of
    patients with images on both sides, where their geometric mean stands, so that no variance is negative."""
    total = np.zeros(int(patients.max()) + 1)
    for side in (positive, ~positive):
        owners = patients[side]
        many = len(np.unique(owners))
        factor = np.sqrt(many / (many - 1)) if many > 1 else 1.0
        total += factor * np.bincount(owners, weights=components[side], minlength=len(total)) / side.sum()
    return total
