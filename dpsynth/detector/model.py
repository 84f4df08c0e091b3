"""The detector: a logistic regression on traces, its probabilities calibrated on images that it was not trained on.

A file of about a hundred numbers as JSON: whoever gets it can read it, and nothing in it can run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from dpsynth.detector.traces import SMALLEST_SIDE, traces
from dpsynth.errors import ArtifactError

Array = NDArray[np.float64]
SCHEMA = 1
FILE = "detector.json"
NO_DETECTOR = "no_detector"  # in the facts of a run and of a release: why none could be made though it was asked for
_CLIP = 4.0  # standard deviations: a trace far from all that was seen says no more than one that far
_RIDGE = 1e-2
_WITHIN = 0.995  # share of what it was trained on that it calls known
_MOST_PIXELS = 2**27  # of one image: a file may not ask for more memory than any image needs


@dataclass(frozen=True, kw_only=True)
class Detector:
    """shape: (channel, *space) of the images that it knows. centre, scale: (traces,). weights: (2 * traces,), of standardised traces and
    their squares. calibration: slope and intercept of the log-odds. kinds: (2, kinds, traces), mean and standard
    deviation of each kind of image that it was trained on. reach: how far from the nearest of them, in the root mean square of standardised
    traces, images may lie of which it has an opinion. evaluation: what is reported of it."""

    shape: tuple[int, ...]
    centre: Array
    scale: Array
    weights: Array
    bias: float
    calibration: tuple[float, float]
    kinds: Array
    reach: float
    evaluation: Mapping[str, Any]

    def probability(self, images: NDArray[np.uint8]) -> Array:
        """Probability (n,) that each 8-bit image (n, *shape) is synthetic, when half of what is asked about is. Raises ValueError."""
        if images.shape[1:] != self.shape:
            raise ValueError(f"Expected images of shape {self.shape}, found {images.shape[1:]}.")
        return self.of_traces(traces(images))

    def of_traces(self, rows: Array) -> Array:
        """The same of traces (n, traces)."""
        slope, intercept = self.calibration
        return sigmoid(slope * self.log_odds(rows) + intercept)

    def knows(self, rows: Array) -> NDArray[np.bool_]:
        """Whether images of these traces (n, traces) are of the kind that it was trained on; of others its probability means nothing."""
        return np.asarray(_distance(rows, self.kinds) <= self.reach)

    def log_odds(self, rows: Array) -> Array:
        """Before calibration."""
        return np.asarray(_expanded((rows - self.centre) / self.scale) @ self.weights + self.bias)

    def to_json(self) -> dict[str, Any]:
        """Everything; numbers to nine digits."""
        numbers = {name: [float(f"{value:.9g}") for value in getattr(self, name)] for name in ("centre", "scale", "weights", "calibration")}
        return {
            "schema": SCHEMA,
            "shape": list(self.shape),
            **numbers,
            "bias": float(f"{self.bias:.9g}"),
            "kinds": [[[float(f"{value:.6g}") for value in row] for row in part] for part in self.kinds],
            "reach": float(f"{self.reach:.9g}"),
            "evaluation": dict(self.evaluation),
        }

    @classmethod
    def from_json(cls, value: Any) -> Detector:
        """Inverse of `to_json`. Raises ArtifactError."""
        try:
            if value["schema"] != SCHEMA:
                raise ArtifactError(f"Expected a detector of schema {SCHEMA}, found {value['schema']!r}. Use the dpsynth that made it.")
            shape = tuple(int(side) for side in value["shape"])
            if len(shape) not in (3, 4) or min(shape[1:]) < SMALLEST_SIDE or np.prod(shape, dtype=np.float64) > _MOST_PIXELS:
                raise ArtifactError(f"Expected the shape of images in {FILE}, found {list(shape)}. Get the release again.")
            centre, scale, weights = (np.array(value[name], dtype=np.float64) for name in ("centre", "scale", "weights"))
            kinds = np.array(value["kinds"], dtype=np.float64)
            slope, intercept = (float(number) for number in value["calibration"])
            made = cls(
                shape=shape,
                centre=centre,
                scale=scale,
                weights=weights,
                bias=float(value["bias"]),
                calibration=(slope, intercept),
                kinds=kinds,
                reach=float(value["reach"]),
                evaluation=dict(value["evaluation"]),
            )
            numbers = np.concatenate([centre, scale, weights, kinds.ravel(), [made.bias, made.reach, slope, intercept]])
            width = traces(np.zeros((1, *shape), dtype=np.uint8)).shape[1]
            fitting = (len(centre), len(scale), len(weights)) == (width, width, 2 * width) and kinds.shape == (2, kinds.shape[1], width)
            if not (fitting and np.isfinite(numbers).all() and (scale > 0).all() and (kinds[1] > 0).all()):
                raise ArtifactError(f"Expected {width} traces with finite numbers in {FILE}, found others. Get the release again.")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ArtifactError(f"The detector in {FILE} cannot be read ({type(error).__name__}). Get the release again.") from error
        return made


def fit(real: Array, synthetic: Mapping[str, Array], *, shape: tuple[int, ...], evaluation: Mapping[str, Any]) -> Detector:
    """Train on traces of real images and, by generator, of synthetic ones: both sides count alike, all generators too. Uncalibrated."""
    rows = np.concatenate([real, *synthetic.values()])
    answers = np.concatenate([np.zeros(len(real)), *(np.ones(len(part)) for part in synthetic.values())])
    weights = np.concatenate(
        [np.full(len(real), 0.5 / len(real)), *(np.full(len(part), 0.5 / len(part) / len(synthetic)) for part in synthetic.values())]
    )
    centre = np.average(rows, axis=0, weights=weights)
    scale = np.sqrt(np.average((rows - centre) ** 2, axis=0, weights=weights)) + 1e-6
    kinds = np.array([[part.mean(axis=0), part.std(axis=0) + 1e-2] for part in (real, *synthetic.values())]).swapaxes(0, 1)
    found = logistic(_expanded((rows - centre) / scale), answers, weights, ridge=_RIDGE)
    return Detector(
        shape=shape,
        centre=centre,
        scale=scale,
        weights=found[:-1],
        bias=float(found[-1]),
        calibration=(1.0, 0.0),
        kinds=kinds,
        reach=float(np.quantile(_distance(rows, kinds), _WITHIN)),
        evaluation=evaluation,
    )


def logistic(rows: Array, answers: Array, weights: Array, *, ridge: float) -> Array:
    """Coefficients and, last, the intercept of a weighted logistic regression; the ridge is on the coefficients alone."""
    design = np.column_stack([rows, np.ones(len(rows))])
    penalty = np.append(np.full(rows.shape[1], ridge), 0.0)

    def loss(b: Array) -> tuple[float, Array]:
        odds = design @ b
        value = weights @ (np.logaddexp(0, odds) - answers * odds) + 0.5 * penalty @ b**2
        return float(value), design.T @ (weights * (sigmoid(odds) - answers)) + penalty * b

    return np.asarray(
        minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 1000, "ftol": 1e-13, "gtol": 1e-8}).x
    )


def sigmoid(odds: Array) -> Array:
    """1 / (1 + exp(-odds)) without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0, -odds)))


def _distance(rows: Array, kinds: Array) -> Array:
    """Of traces (n, traces) from the nearest kind."""
    return np.asarray(np.min([np.sqrt((((rows - mean) / spread) ** 2).mean(axis=1)) for mean, spread in zip(*kinds, strict=True)], axis=0))


def _expanded(standardised: Array) -> Array:
    z = np.clip(standardised, -_CLIP, _CLIP)
    return np.concatenate([z, z**2 - 1], axis=1)
