"""Labels that a classifier, trained on the other patients, holds for wrong (confident learning; Northcutt, Jiang and Chuang 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dpsynth.audit.finding import Finding, Kind
from dpsynth.data.cohort import Int64
from dpsynth.progress import Progress

Array = NDArray[np.float64]
FOLDS = 5
_BELIEVED = 0.1  # largest probability of the stated label


def out_of_fold(features: Array, labels: Int64, patients: Int64, *, classes: int, progress: Progress) -> Array:
    """Class probabilities (n, classes) of each image by a logistic regression on patients of other folds; rows of a class that a fold
    lacks stay 0 there."""
    probabilities = np.zeros((len(labels), classes))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    for number, (train, test) in enumerate(folds.split(features, labels, patients), 1):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
        model.fit(features[train], labels[train])
        probabilities[test[:, None], model[-1].classes_[None]] = model.predict_proba(features[test])
        progress("labels, by folds", number, FOLDS)
    return probabilities


def suspicious(probabilities: Array, labels: Int64) -> NDArray[np.bool_]:
    """Images (n,) whose label is believed with at most 0.1, while another class is believed as firmly as its own members are on average."""
    classes = probabilities.shape[1]
    firm = np.array([probabilities[labels == j, j].mean() if (labels == j).any() else np.inf for j in range(classes)])
    rows = np.arange(len(labels))
    others = probabilities >= np.maximum(firm, 0.5)
    others[rows, labels] = False
    return np.asarray(others.any(axis=1) & (probabilities[rows, labels] <= _BELIEVED))


def doubtful_labels(
    features: Array, labels: Int64, patients: Int64, names: Sequence[str], classes: Sequence[str], *, progress: Progress
) -> tuple[list[Finding], float]:
    """Findings, the least believed first, and the accuracy of the classifier: with one near chance they mean nothing."""
    if len(classes) < 2 or min(np.bincount(labels, minlength=len(classes))) < FOLDS:
        return [], 0.0
    probabilities = out_of_fold(features, labels, patients, classes=len(classes), progress=progress)
    rows = np.flatnonzero(suspicious(probabilities, labels))
    order = rows[np.argsort(probabilities[rows, labels[rows]], kind="stable")]
    findings = [
        Finding(
            kind=Kind.LABEL,
            images=(names[row],),
            proposed=(names[row],),
            detail=f"labelled {classes[labels[row]]} (believed {probabilities[row, labels[row]]:.1%}), "
            f"looks like {classes[int(probabilities[row].argmax())]} ({probabilities[row].max():.1%})",
            rows=(int(row),),
        )
        for row in order
    ]
    recall = [float((probabilities[labels == j].argmax(axis=1) == j).mean()) for j in range(len(classes))]
    return findings, float(np.mean(recall))
