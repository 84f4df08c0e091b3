"""How good a detector is on generators that it knows and on one that it has never seen: each is left out in turn, of calibration too.

A detector that is tested on the generators that it was trained on looks far better than it is: in the Deepfake Detection Challenge the log
loss of the best entries was near 0.2 on the public test and 0.43 on the private one (Dolhansky et al. 2020). Siblings (one net, two
settings) are no strangers to each other either, so whole families are left out as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dpsynth.detector.model import Detector, fit, logistic, sigmoid

Array = NDArray[np.float64]
_BINS = 10
GUESSING = float(np.log(2))  # log loss of one half for every image
OWN, LEFT_OUT = "images of this release, not trained on", "generator left out"
LEAST_KNOWN = 0.8  # of the release's own images must be of a kind that the detector knows
LEAST_RECOGNISED = 0.5  # of them must be called rather synthetic: who guesses recognises half
_FAR = 2 * GUESSING
_ALMOST = 1e-6


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Log-odds of real and of synthetic images by detectors that were not trained on them."""

    real: Array
    synthetic: Array


@dataclass(frozen=True, kw_only=True)
class Quality:
    """log_loss: 0.693 is that of guessing; both sides count alike. calibration_error: of ten equal bins (Guo et al. 2017)."""

    log_loss: float
    auc: float
    calibration_error: float

    def to_json(self) -> dict[str, float]:
        """Rounded."""
        return {name: round(value, 4) for name, value in self.__dict__.items()}


def quality(real: Array, synthetic: Array) -> Quality:
    """Of probabilities (n,) and (m,) that images are synthetic."""
    p = np.clip(np.concatenate([real, synthetic]), _ALMOST, 1 - _ALMOST)
    truth = np.r_[np.zeros(len(real)), np.ones(len(synthetic))]
    weights = np.r_[np.full(len(real), 0.5 / len(real)), np.full(len(synthetic), 0.5 / len(synthetic))]
    bins = np.minimum((p * _BINS).astype(int), _BINS - 1)
    gaps = [abs(float(weights[bins == b] @ (p - truth)[bins == b])) for b in np.unique(bins)]
    return Quality(
        log_loss=float(-(weights @ (truth * np.log(p) + (1 - truth) * np.log(1 - p)))),
        auc=float(stats.mannwhitneyu(p[len(real) :], p[: len(real)]).statistic / (len(real) * len(synthetic))),
        calibration_error=float(sum(gaps)),
    )


def own_quality(probabilities: Array, known: NDArray[np.bool_]) -> dict[str, float]:
    """Of probabilities (n,) that the release's own images are synthetic, which they all are. An image of no known kind gets no opinion,
    so it is not recognised; the log loss counts it all the same."""
    return {
        "share of a known kind": round(float(known.mean()), 4),
        "mean probability": round(float(probabilities.mean()), 4),
        "share above one half": round(float((probabilities > 0.5).mean()), 4),
        "share recognised": round(float((known & (probabilities > 0.5)).mean()), 4),
        "log_loss": round(float(-np.log(np.maximum(probabilities, _ALMOST)).mean()), 4),
    }


def unfit(evaluation: Mapping[str, Any]) -> str:
    """Why a detector of these figures may not be released, empty when it may; they are public, so nobody pays for asking.

    It must do on the release's own images what it is released for: know their kind, recognise at least half of them, and have no more
    log loss than guessing. Images of generators that were left out do not decide: after moments alone the only other generator is a sibling
    without texture, whose log loss is near 7 even where the release's own images are recognised at 97 %; that is `doubts`.
    """
    own = evaluation.get(OWN)
    if own is None:
        return ""
    if own["share of a known kind"] < LEAST_KNOWN:
        return (
            f"only {own['share of a known kind']:.0%} of the drawn images are like what a detector is trained on, since the public images "
            "of pretrain are of another kind"
        )
    if recognised(own) < LEAST_RECOGNISED or own["log_loss"] > GUESSING:
        return f"on the drawn images it would do worse than guessing: {figures(own)}"
    return ""


def doubts(evaluation: Mapping[str, Any]) -> str:
    """What a user of a released detector must know besides: empty unless it is far worse than guessing on a generator left out."""
    losses = {name: float(row["log_loss"]) for name, row in evaluation.get(LEFT_OUT, {}).items()}
    far = [f"{name}: {loss:.2f}" for name, loss in losses.items() if loss > _FAR]
    if not far:
        return ""
    return (
        f"the detector is often sure and wrong about generators that it has not seen (log loss of {'; '.join(far)}; guessing has "
        f"{GUESSING:.2f}), so it is for images of this release and not for those of others"
    )


def recognised(own: Mapping[str, float]) -> float:
    """Share of the release's own images that are called rather synthetic."""
    return own.get("share recognised", own["share above one half"])


def figures(own: Mapping[str, float]) -> str:
    """Of the release's own images beside those of guessing."""
    return f"{recognised(own):.0%} recognised, log loss {own['log_loss']:.2f}, where guessing has 50% and {GUESSING:.2f}"


def cross_validated(real: Array, synthetic: Mapping[str, Array], *, shape: tuple[int, ...]) -> dict[str, Answers]:
    """Answers by generator, of detectors that know all generators and saw the other half of the images of each side.

    real: (n, traces), images of one person next to each other, so that a person is in one half.
    """
    halves = [{name: np.array_split(rows, 2)[half] for name, rows in synthetic.items()} for half in range(2)]
    sides = np.array_split(real, 2)
    detectors = [fit(sides[1 - half], halves[1 - half], shape=shape, evaluation={}) for half in range(2)]
    judged = np.concatenate([detector.log_odds(side) for detector, side in zip(detectors, sides, strict=True)])
    return {
        name: Answers(
            real=judged,
            synthetic=np.concatenate([detector.log_odds(half[name]) for detector, half in zip(detectors, halves, strict=True)]),
        )
        for name in synthetic
    }


def leave_one_generator_out(real: Array, synthetic: Mapping[str, Array], *, shape: tuple[int, ...]) -> dict[str, Answers]:
    """Calibrated log-odds by the generator that was left out, of training and of calibration alike.

    Each half of the real images is judged by a detector trained on the other half, so none is judged by one that was trained on it.
    """
    sides, found = np.array_split(real, 2), {}
    for name, rows in synthetic.items():
        others = {other: part for other, part in synthetic.items() if other != name}
        slope, intercept = calibration(cross_validated(real, others, shape=shape))
        detectors = [fit(sides[1 - half], others, shape=shape, evaluation={}) for half in range(2)]
        parts = zip(detectors, sides, np.array_split(rows, 2), strict=True)
        judged = [(slope * made.log_odds(side) + intercept, slope * made.log_odds(part) + intercept) for made, side, part in parts]
        found[name] = Answers(real=np.concatenate([a for a, _ in judged]), synthetic=np.concatenate([b for _, b in judged]))
    return found


def calibration(answers: Mapping[str, Answers]) -> tuple[float, float]:
    """Slope and intercept that make log-odds probabilities (Platt 1999), both sides and all generators counting alike."""
    sides = [(side, float(answer)) for found in answers.values() for answer, side in enumerate((found.real, found.synthetic))]
    odds, truth = np.concatenate([side for side, _ in sides]), np.concatenate([np.full(len(side), answer) for side, answer in sides])
    weights = np.concatenate([np.full(len(side), 1 / len(side) / len(sides)) for side, _ in sides])
    slope, intercept = logistic(odds[:, None], truth, weights, ridge=0.0)
    return float(slope), float(intercept)


def trained_detector(real: Array, synthetic: Mapping[str, Array], *, shape: tuple[int, ...]) -> Detector:
    """Train on everything and calibrate by cross-validation: probabilities are those for these generators. The evaluation tells what
    becomes of them for each generator as if it had been unknown, and for each family, which is a name's part before a comma.

    Raises ValueError for fewer than two generators.
    """
    if len(synthetic) < 2:
        raise ValueError(f"Expected two generators at least, of which one can be left out, found {len(synthetic)}.")
    known = cross_validated(real, synthetic, shape=shape)
    slope, intercept = calibration(known)
    calibrated = {name: Answers(real=slope * a.real + intercept, synthetic=slope * a.synthetic + intercept) for name, a in known.items()}
    families: dict[str, list[Array]] = {}
    for name, part in synthetic.items():
        families.setdefault(name.partition(",")[0], []).append(part)
    evaluation: dict[str, object] = {
        "log_loss of guessing": round(GUESSING, 4),
        "generator known": _rows(calibrated),
        LEFT_OUT: _rows(leave_one_generator_out(real, synthetic, shape=shape)),
    }
    if 1 < len(families) < len(synthetic):
        joined = {name: np.concatenate(parts) for name, parts in families.items()}
        evaluation["family left out"] = _rows(leave_one_generator_out(real, joined, shape=shape))
    return replace(fit(real, synthetic, shape=shape, evaluation=evaluation), calibration=(slope, intercept))


def _rows(answers: Mapping[str, Answers]) -> dict[str, dict[str, float]]:
    return {name: quality(sigmoid(found.real), sigmoid(found.synthetic)).to_json() for name, found in answers.items()}
