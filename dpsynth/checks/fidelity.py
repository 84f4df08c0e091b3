"""Do the synthetic images look like real ones, and are they as varied? Always beside real against real.

Four figures decide, each as part of what real images reach. Their intervals come from subsamples without replacement, since drawing with
replacement makes doubles, which neighbourhoods take for near neighbours. Subsamples of m of n rows a side vary by sqrt((n - m) / m) of
what the figure itself does (delete-d jackknife, Shao and Wu 1989), so that their spread is scaled up by the inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dpsynth.checks.evidence import Features
from dpsynth.checks.gaussian_distance import frechet_distance
from dpsynth.checks.statistics import neighbourhoods, neighbourhoods_from, pairwise, share_interval
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig

Array = NDArray[np.float64]
QUESTION = "Do the synthetic images look like real ones and cover their variety?"
LIMITATION = "It sees what the encoder sees ({encoder}) and misses small findings. KID rewards blur and decides nothing here."
CONFIDENCE = 0.95  # of the intervals of all deciding figures together, so that all together fail without cause at half of the rest
_FEWEST = 30
_MOST = 1000
_DRAWS = 100
_PART = 0.8  # of the rows, in each draw
_TAKEN_FOR_SHARP = 0.5  # of the precision and of the coverage that sharp real images reach
_MEASURES = ("precision", "recall", "density", "coverage")
_DECIDING = {
    "precision": "too few synthetic images look real",
    "spread": "the synthetic images are too much alike",
    "coverage": "the synthetic images cover too little of the real variety",
    "distance": "the synthetic images repeat each other",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A figure of synthetic images as part of what real ones reach, with its interval and the policy's limit."""

    value: float
    low: float
    high: float
    limit: float

    @property
    def half_width(self) -> float:
        """Of the interval."""
        return (self.high - self.low) / 2


def fidelity(features: Features, gate: GateConfig, *, rng: np.random.Generator, description: Mapping[str, float] | None = None) -> Verdict:
    """FAIL when precision, spread, coverage or the distance to the nearest other image, as part of what real images reach, lies surely
    below the policy's limit; INCONCLUSIVE when one lies below and not surely, with few images, or when the encoder takes real images that
    are out of focus for sharp ones.

    `description` holds further figures, which are reported and decide nothing.
    """
    size = min(len(features.control), len(features.training), len(features.synthetic), _MOST)
    if size < _FEWEST:
        reason = f"{size} patients or images are too few; {_FEWEST} are needed"
        return _verdict(features, gate, Outcome.INCONCLUSIVE, reason, Part(value=0.0, low=0.0, high=1.0, limit=0.0), description or {})
    sides = _Sides.chosen(features, size, rng)
    ours, real = sides.draws(rng)
    limits = {
        "precision": gate.smallest_precision,
        "spread": gate.smallest_spread,
        "coverage": gate.smallest_coverage,
        "distance": gate.smallest_distance,
    }
    parts = {name: _part(ours[name], real[name], size, limit, share=name in _MEASURES) for name, limit in limits.items()}
    text = ", ".join(f"{name} {ours[name].mean():.2f} (real {real[name].mean():.2f})" for name in _MEASURES)
    shown = ", ".join(f"{name} {part.value:.3f} ± {part.half_width:.3f} (limit {part.limit:g})" for name, part in parts.items())
    distances, unsaid = _frechet(features)
    outcome, finding = _decided(parts)
    focus, unfocused = _out_of_focus(features)
    if outcome is Outcome.PASS and focus and min(focus.values()) >= _TAKEN_FOR_SHARP:
        outcome, finding = Outcome.INCONCLUSIVE, "the encoder takes images out of focus for sharp ones and can judge none; name another: "
    figures = {f"{name}, synthetic": float(values.mean()) for name, values in ours.items() if name in _MEASURES}
    figures |= {f"{name}, real": float(values.mean()) for name, values in real.items() if name in _MEASURES}
    for name, part in parts.items():
        figures |= {f"{name} as part of real{key}": v for key, v in (("", part.value), (", low", part.low), (", high", part.high))}
    figures |= {**distances, **focus, "images a side": float(size), **(description or {})}
    return _verdict(features, gate, outcome, f"{finding}{text}; as part of real: {shown}{unfocused}{unsaid}", parts["precision"], figures)


def _decided(parts: Mapping[str, Part]) -> tuple[Outcome, str]:
    """The outcome and what led to it, empty for a pass."""
    surely = [_DECIDING[name] for name, part in parts.items() if part.high < part.limit]
    below = [name for name, part in parts.items() if part.value < part.limit]
    if surely:
        return Outcome.FAIL, f"{'; '.join(surely)}: "
    if below:
        return Outcome.INCONCLUSIVE, f"{' and '.join(below)} below the limit, and by no more than chance may do: "
    return Outcome.PASS, ""


def _part(ours: Array, real: Array, size: int, limit: float, *, share: bool) -> Part:
    """Ratio of the means of paired draws, by linearisation; limits of a share as Korn and Graubard's, of others on a logarithmic scale."""
    most = max(float(real.mean()), 1e-9)
    value = float(ours.mean()) / most
    kept = _rows_a_draw(size)
    stddev = float(np.std((ours - value * real) / most, ddof=1)) * float(np.sqrt(kept / (size - kept)))
    confidence = 1 - (1 - CONFIDENCE) / len(_DECIDING)
    if share:
        low, high = share_interval(float(ours.mean()), stddev * most, size, confidence)
        return Part(value=value, low=low / most, high=high / most, limit=limit)
    factor = float(np.exp(stats.norm.ppf((1 + confidence) / 2) * stddev / max(value, 1e-12)))
    return Part(value=value, low=value / factor, high=value * factor, limit=limit)


def _rows_a_draw(size: int) -> int:
    return round(_PART * size)


@dataclass(frozen=True, kw_only=True)
class _Sides:
    """Equally many rows of each side, (n, d), and the distances among them, (n, n), of which each draw takes a part."""

    control: Array
    training: Array
    synthetic: Array
    control_thumbnails: Array
    synthetic_thumbnails: Array

    @classmethod
    def chosen(cls, features: Features, size: int, rng: np.random.Generator) -> _Sides:
        control, training, synthetic = (
            rng.permutation(len(side))[:size] for side in (features.control, features.training, features.synthetic)
        )
        return cls(
            control=features.control[control],
            training=features.training[training],
            synthetic=features.synthetic[synthetic],
            control_thumbnails=features.control_thumbnails[control],
            synthetic_thumbnails=features.synthetic_thumbnails[synthetic],
        )

    def draws(self, rng: np.random.Generator) -> tuple[dict[str, Array], dict[str, Array]]:
        """Figures by name over random draws of each side, (draws,), of synthetic and of real images against the same control patients."""
        size = len(self.control)
        among = pairwise(self.control, self.control)
        synthetic = pairwise(self.control, self.synthetic), pairwise(self.synthetic, self.synthetic)
        training = pairwise(self.control, self.training), pairwise(self.training, self.training)
        small = pairwise(self.control_thumbnails, self.control_thumbnails), pairwise(self.synthetic_thumbnails, self.synthetic_thumbnails)
        spreads = _spread_of(self.control), _spread_of(self.synthetic)
        ours, real = [], []
        for _ in range(_DRAWS):
            c, t, s = (rng.permutation(size)[: _rows_a_draw(size)] for _ in range(3))
            near = among[np.ix_(c, c)]
            against = neighbourhoods_from(near, synthetic[0][np.ix_(c, s)], synthetic[1][np.ix_(s, s)])
            ours.append({**against.__dict__, "spread": spreads[1](s), "distance": _apart(small[1][np.ix_(s, s)])})
            against = neighbourhoods_from(near, training[0][np.ix_(c, t)], training[1][np.ix_(t, t)])
            real.append({**against.__dict__, "spread": spreads[0](c), "distance": _apart(small[0][np.ix_(c, c)])})
        return _columns(ours), _columns(real)


def _columns(draws: list[dict[str, float]]) -> dict[str, Array]:
    return {name: np.array([draw[name] for draw in draws]) for name in draws[0]}


def _spread_of(rows: Array) -> Callable[[NDArray[np.int64]], float]:
    """Root mean square distance from the mean of chosen rows, without copying them. Coverage alone misses a collapse to the mean image,
    which lies near to many others."""
    centred = rows - rows.mean(axis=0)
    lengths = (centred**2).sum(axis=1)

    def spread(chosen: NDArray[np.int64]) -> float:
        weights = np.bincount(chosen, minlength=len(rows)) / len(chosen)
        return float(np.sqrt(max(float(lengths[chosen].mean() - ((weights @ centred) ** 2).sum()), 0.0)))

    return spread


def _apart(distances: Array) -> float:
    """Median distance to the nearest other thumbnail, from distances (n, n). Few images drawn over and over with a little noise are as far
    from their mean as real ones and look real; the encoder takes their noise for texture."""
    np.fill_diagonal(distances, np.inf)
    return float(np.median(distances.min(axis=1)))


def _out_of_focus(features: Features) -> tuple[dict[str, float], str]:
    """What images out of focus reach, as part of what sharp ones do, with words for it: whether the encoder could see any fault."""
    if features.blurred is None:
        return {}, ""
    size = min(len(features.control), len(features.blurred))
    control = features.control[:size]
    real, found = neighbourhoods(control, features.training[:size]), neighbourhoods(control, features.blurred[:size])
    parts = {name: getattr(found, name) / max(getattr(real, name), 1e-9) for name in ("precision", "coverage")}
    words = "; real images out of focus would reach " + ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
    return {f"{name} of images out of focus as part of real": value for name, value in parts.items()}, words


def _frechet(features: Features) -> tuple[dict[str, float], str]:
    """FD of encoder features on equal numbers, all that there are; or why there is none: a covariance of fewer rows than twice its columns
    is mostly chance."""
    size, width = min(len(features.control), len(features.training), len(features.synthetic)), features.control.shape[1]
    if size < 2 * width:
        return {}, f"; FD of encoder features left out: of {width} features it needs {2 * width} patients and images a side, not {size}"
    control = features.control[:size]
    return {
        "FD of encoder features, synthetic": frechet_distance(control, features.synthetic[:size]),
        "FD of encoder features, real": frechet_distance(control, features.training[:size]),
    }, ""


def _verdict(features: Features, gate: GateConfig, outcome: Outcome, reason: str, precision: Part, figures: Mapping[str, float]) -> Verdict:
    return Verdict(
        check="fidelity",
        question=QUESTION,
        outcome=outcome,
        statistic_name="precision as part of real against real",
        statistic=precision.value,
        interval=(precision.low, precision.high),
        threshold=gate.smallest_precision,
        confidence_level=CONFIDENCE,
        false_alarm_rate=(1 - CONFIDENCE) / 2,
        reason=reason,
        limitation=LIMITATION.format(encoder=features.encoder),
        figures=figures,
    )
