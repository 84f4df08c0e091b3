"""Do the synthetic images look like real ones, and are they as varied? Always beside real against real."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dpsynth.checks.evidence import Features
from dpsynth.checks.statistics import kid, nearest, neighbourhoods
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig

Array = NDArray[np.float64]
QUESTION = "Do the synthetic images look like real ones and cover their variety?"
LIMITATION = "It sees what the encoder sees ({encoder}) and misses small findings. KID rewards blur and decides nothing here."
_FEWEST = 30
_MOST = 1000
_DRAWS = 20
_MEASURES = ("precision", "recall", "density", "coverage")


def measures(real: Array, other: Array) -> dict[str, float]:
    """KID and the four neighbourhood measures of `other` against `real`."""
    return {"kid": kid(real, other), **neighbourhoods(real, other).__dict__}


def fidelity(features: Features, gate: GateConfig, *, rng: np.random.Generator, description: Mapping[str, float] | None = None) -> Verdict:
    """FAIL when precision, spread, coverage or the distance to the nearest other image, as part of what real images reach, lies below
    the policy's limit; INCONCLUSIVE with few images.

    `description` holds further figures, which are reported and decide nothing.
    """
    control, training = features.control, features.training
    size = min(len(control), len(training), len(features.synthetic), _MOST)
    synthetic_draws, real_draws = _draws(control, features.synthetic, training, size, rng)
    mean = {name: (_mean(synthetic_draws, name), _mean(real_draws, name)) for name in ("kid", *_MEASURES)}
    ratios = np.array([d["precision"] / max(_mean(real_draws, "precision"), 1e-9) for d in synthetic_draws])
    coverage = mean["coverage"][0] / max(mean["coverage"][1], 1e-9)
    precision = mean["precision"][0] / max(mean["precision"][1], 1e-9)
    spread = _spread(features.synthetic) / max(_spread(control), 1e-9)
    apart = _apart(features.synthetic_thumbnails, size, rng) / max(_apart(features.control_thumbnails, size, rng), 1e-9)
    text = ", ".join(f"{name} {mean[name][0]:.2f} (real {mean[name][1]:.2f})" for name in _MEASURES)
    outcome, reason = Outcome.PASS, text
    if size < _FEWEST:
        outcome, reason = Outcome.INCONCLUSIVE, f"{size} patients or images are too few; {_FEWEST} are needed"
    elif float(np.quantile(ratios, 0.975)) < gate.smallest_precision:
        outcome, reason = Outcome.FAIL, f"too few synthetic images look real: {text}"
    elif spread < gate.smallest_spread:
        outcome, reason = Outcome.FAIL, f"the synthetic images are too much alike (spread {spread:.2f} of the real one): {text}"
    elif coverage < gate.smallest_coverage:
        outcome, reason = Outcome.FAIL, f"the synthetic images cover too little of the real variety: {text}"
    elif apart < gate.smallest_distance:
        outcome, reason = Outcome.FAIL, f"the synthetic images repeat each other (distance {apart:.2f} of the real one): {text}"
    figures = {f"{name}, synthetic": pair[0] for name, pair in mean.items()} | {f"{name}, real": pair[1] for name, pair in mean.items()}
    return Verdict(
        check="fidelity",
        question=QUESTION,
        outcome=outcome,
        statistic_name="precision as part of real against real",
        statistic=precision,
        interval=(float(np.quantile(ratios, 0.025)), float(np.quantile(ratios, 0.975))),
        threshold=gate.smallest_precision,
        confidence_level=0.95,
        false_alarm_rate=0.025,
        reason=reason,
        limitation=LIMITATION.format(encoder=features.encoder),
        figures={
            **figures,
            "spread as part of real": spread,
            "distance as part of real": apart,
            "images a side": float(size),
            **(description or {}),
        },
    )


def _spread(rows: Array) -> float:
    """Root mean square distance from the mean. Coverage alone misses a collapse to the mean image, which lies near to many others."""
    return float(np.sqrt(rows.var(axis=0).sum()))


def _apart(rows: Array, size: int, rng: np.random.Generator) -> float:
    """Median distance to the nearest other of `size` thumbnails. Few images drawn over and over with a little noise are as far from
    their mean as real ones and look real; the encoder takes their noise for texture."""
    chosen = rows[rng.permutation(len(rows))[:size]]
    return float(np.median(nearest(chosen, chosen, own=np.arange(len(chosen)))[0])) if len(chosen) > 1 else 0.0


def _draws(
    control: Array, synthetic: Array, training: Array, size: int, rng: np.random.Generator
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Measures over random draws of equal size, synthetic and real in turn against the same control patients."""
    part = max(7, round(0.8 * size))
    if size < 7:
        empty = dict.fromkeys(("kid", *_MEASURES), 0.0)
        return [empty], [empty]
    ours, real = [], []
    for _ in range(_DRAWS):
        against = control[rng.permutation(len(control))[:part]]
        ours.append(measures(against, synthetic[rng.permutation(len(synthetic))[:part]]))
        real.append(measures(against, training[rng.permutation(len(training))[:part]]))
    return ours, real


def _mean(draws: list[dict[str, float]], name: str) -> float:
    return float(np.mean([draw[name] for draw in draws]))
