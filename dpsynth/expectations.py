"""What to expect for so many patients at some epsilon, from runs on procedural images (experiments/005-planning-curves).

The noise of every stage, beside what many patients have in common, is proportional to 1 / (patients * mu), with mu the privacy parameter of
(epsilon, delta): runs of equal product are taken to be alike, and figures between measured products are interpolated over its logarithm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import isotonic_regression

from dpsynth.artifacts import read_json
from dpsynth.privacy.calibrate import mu_of

PATH = Path(__file__).with_name("expectations.json")
_FIGURES = ("auc", "precision", "coverage")


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """auc: of a classifier trained on the synthetic images, on real ones; precision, coverage: as the check of fidelity has them."""

    patients: float
    epsilon: float
    delta: float
    auc: float
    precision: float
    coverage: float

    def figures(self) -> dict[str, float]:
        """All but patients and delta, for JSON; the epsilon of real images, infinity, is left out."""
        of = {} if self.epsilon == math.inf else {"epsilon": self.epsilon}
        return of | {name: getattr(self, name) for name in _FIGURES}


@dataclass(frozen=True, kw_only=True)
class Expectations:
    """points: measured; real: real images in the place of synthetic ones."""

    points: tuple[Expectation, ...]
    real: Expectation

    def at(self, *, patients: float, epsilon: float, delta: float) -> Expectation:
        """Interpolated figures, none worse for more signal; beyond the measured ends those of the end."""
        points = sorted(self.points, key=lambda point: _signal(point.patients, point.epsilon, point.delta))
        signals = [_signal(point.patients, point.epsilon, point.delta) for point in points]
        rising = {name: isotonic_regression([getattr(point, name) for point in points]).x for name in _FIGURES}
        wanted = _signal(patients, epsilon, delta)
        figures = {name: float(np.interp(wanted, signals, values)) for name, values in rising.items()}
        return Expectation(patients=patients, epsilon=epsilon, delta=delta, **figures)


def _signal(patients: float, epsilon: float, delta: float) -> float:
    """log(patients * mu)."""
    return math.log(patients * mu_of(epsilon, delta))


def load_expectations(path: Path = PATH) -> Expectations:
    """The table that comes with the package."""
    stored = read_json(path)
    real = Expectation(patients=math.inf, epsilon=math.inf, delta=1.0, **stored["real"])
    return Expectations(points=tuple(Expectation(**point) for point in stored["points"]), real=real)
