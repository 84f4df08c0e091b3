"""When fidelity fails, passes and cannot tell; that it fails no more often than stated, also at the limits themselves; and its figures."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from evidence_cases import features_of
from scipy import stats
from test_decisions import GATE, points

from dpsynth.checks.fidelity import fidelity
from dpsynth.checks.gaussian_distance import frechet_distance
from dpsynth.checks.statistics import clopper_pearson, neighbourhoods, neighbourhoods_from, pairwise, share_interval
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig

DECIDING = {
    "precision": "smallest_precision",
    "spread": "smallest_spread",
    "coverage": "smallest_coverage",
    "distance": "smallest_distance",
}
WIDTH = 12


def at(**limits: float) -> GateConfig:
    """A policy with these limits, and none of the others."""
    return GATE.model_copy(update={**dict.fromkeys(DECIDING.values(), 0.0), **limits})


def mixture(share: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """A generator of which a share of the images is real and the rest is nowhere near: its precision is that part of the real one."""
    drawn = points(count, rng)
    far = rng.random(count) >= share
    drawn[far] *= 8
    return drawn


def test_an_encoder_that_takes_blurred_images_for_sharp_ones_judges_none() -> None:
    rng = np.random.default_rng(3)
    sharp = features_of(*(points(120, rng) for _ in range(3)))
    gate, judge = at(smallest_precision=0.1, smallest_coverage=0.05), partial(fidelity, rng=np.random.default_rng(0))
    blind = judge(replace(sharp, blurred=points(100, rng)), gate)
    assert blind.outcome is Outcome.INCONCLUSIVE
    assert blind.reason.startswith("the encoder takes images out of focus for sharp ones")
    for seen in (points(100, rng) + 4, points(1, rng) + 0.01 * points(100, rng)):  # nothing looks real; all look like one patient
        verdict = judge(replace(sharp, blurred=seen), gate)
        assert verdict.outcome is Outcome.PASS, verdict.reason
        assert "real images out of focus would reach precision" in verdict.reason
    bad = judge(replace(sharp, synthetic=points(120, rng) * 8, blurred=points(100, rng)), gate)
    assert bad.outcome is Outcome.FAIL, "what even a blind encoder sees is seen"


def modes(count: int, rng: np.random.Generator) -> np.ndarray:
    """A generator of eight images with a little noise."""
    centres = points(8, np.random.default_rng(5))
    return centres[rng.integers(8, size=count)] + 0.3 * points(count, rng)


def judged(synthetic: np.ndarray, gate: GateConfig, rng: np.random.Generator, count: int = 120) -> Verdict:
    return fidelity(features_of(synthetic, points(count, rng), points(count, rng)), gate, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("share", "outcome"),
    [(0.6, Outcome.PASS), (0.33, Outcome.INCONCLUSIVE), (0.02, Outcome.FAIL)],
    ids=["above", "just below", "far below"],
)
def test_between_pass_and_fail_it_cannot_tell(share: float, outcome: Outcome) -> None:
    verdict = judged(mixture(share, 120, np.random.default_rng(3)), at(smallest_precision=0.4), np.random.default_rng(4))
    assert verdict.outcome is outcome, verdict.reason
    assert (verdict.statistic >= 0.4) is (outcome is Outcome.PASS)
    assert (verdict.interval[1] < 0.4) is (outcome is Outcome.FAIL)


@pytest.mark.parametrize("figure", DECIDING)
def test_an_estimate_below_its_limit_never_passes_and_is_named(figure: str) -> None:
    drawn, rng = modes(120, np.random.default_rng(1)), np.random.default_rng(2)
    figures = judged(drawn, at(), rng).figures
    value = figures[f"{figure} as part of real"]
    just_above = judged(drawn, at(**{DECIDING[figure]: value + 1e-6}), np.random.default_rng(2))
    assert just_above.outcome is Outcome.INCONCLUSIVE
    assert just_above.reason.startswith(f"{figure} below the limit")
    assert judged(drawn, at(**{DECIDING[figure]: value - 1e-6}), np.random.default_rng(2)).outcome is Outcome.PASS
    high = figures[f"{figure} as part of real, high"]
    assert judged(drawn, at(**{DECIDING[figure]: high + 1e-6}), np.random.default_rng(2)).outcome is Outcome.FAIL


@pytest.mark.parametrize(
    ("repetitions", "count"), [(20, 60), pytest.param(200, 120, marks=pytest.mark.slow, id="200")], ids=lambda value: str(value)
)
@pytest.mark.parametrize("kind", ["precision", "spread and distance", "coverage and all others"])
def test_a_generator_at_the_limit_fails_no_more_often_than_stated(kind: str, repetitions: int, count: int) -> None:
    """2.5 % for all figures together: 20 repetitions fail more than 4 times, or 200 more than 14, less than once in 1,000."""
    draw = {
        "precision": lambda rng: mixture(0.3, count, rng),
        "spread and distance": lambda rng: 0.35 * points(count, rng),
        "coverage and all others": lambda rng: modes(count, rng),
    }[kind]
    limits = {"precision": {"smallest_precision": 0.3}, "spread and distance": {"smallest_spread": 0.35, "smallest_distance": 0.35}}
    gate = at(**limits.get(kind, {}))
    if kind not in limits:  # what it reaches on average, from other hospitals than those that are judged
        known = [judged(draw(rng), gate, rng, count).figures for rng in map(np.random.default_rng, range(1000, 1000 + repetitions))]
        truth = {name: float(np.mean([figures[f"{figure} as part of real"] for figures in known])) for figure, name in DECIDING.items()}
        gate = at(**{name: min(value, 1.0) for name, value in truth.items()})
    found = [judged(draw(rng), gate, rng, count) for rng in map(np.random.default_rng, range(repetitions))]
    failed = sum(verdict.outcome is Outcome.FAIL for verdict in found)
    assert stats.binom.sf(failed - 1, repetitions, found[0].false_alarm_rate) > 1e-3, failed
    assert sum(verdict.outcome is Outcome.PASS for verdict in found) < 0.75 * repetitions, "at the limit half are below it"


def test_the_intervals_are_no_wider_than_they_must_be() -> None:
    """They come from subsamples of one hospital; over 40 hospitals spread and distance scatter by two thirds to three halves of that."""
    found = [judged(modes(60, rng), at(), rng, 60).figures for rng in map(np.random.default_rng, range(40))]
    for figure in ("spread", "distance"):
        values = np.log([figures[f"{figure} as part of real"] for figures in found])
        widths = np.log([figures[f"{figure} as part of real, high"] / figures[f"{figure} as part of real, low"] for figures in found])
        stated = widths.mean() / 2 / stats.norm.ppf(1 - 0.025 / 4)
        assert 2 / 3 < stated / values.std(ddof=1) < 3 / 2


def test_every_reason_says_half_widths_and_limits() -> None:
    for share in (0.6, 0.33, 0.02):
        verdict = judged(mixture(share, 120, np.random.default_rng(3)), at(smallest_precision=0.4), np.random.default_rng(4))
        low, high = verdict.interval
        assert f"precision {verdict.statistic:.3f} ± {(high - low) / 2:.3f} (limit 0.4)" in verdict.reason
        for figure in DECIDING:
            assert f"{figure} {verdict.figures[f'{figure} as part of real']:.3f} ± " in verdict.reason


def test_neighbourhoods_are_the_same_from_distances() -> None:
    rng = np.random.default_rng(0)
    real, synthetic = points(50, rng), points(60, rng) + 0.5
    distances = pairwise(real, real), pairwise(real, synthetic), pairwise(synthetic, synthetic)
    assert neighbourhoods_from(*distances) == neighbourhoods(real, synthetic)


def test_the_interval_of_a_share_is_the_exact_one_of_independent_trials_and_wider_of_fewer() -> None:
    for hits in (0, 7, 40):
        independent = float(np.sqrt(hits / 40 * (1 - hits / 40) / 40))
        assert share_interval(hits / 40, independent, 40, 0.95) == pytest.approx(clopper_pearson(hits, 40, 0.95))
    twice = share_interval(7 / 40, np.sqrt(7 / 40 * 33 / 40 / 20), 40, 0.95)
    assert twice[0] < clopper_pearson(7, 40, 0.95)[0] < clopper_pearson(7, 40, 0.95)[1] < twice[1]


def test_the_frechet_distance_of_features_stands_beside_real_and_needs_enough_patients() -> None:
    rng = np.random.default_rng(0)
    features = features_of(points(150, rng) + 0.7, points(120, rng), points(130, rng))
    figures = fidelity(features, GATE, rng=rng).figures
    assert figures["FD of encoder features, real"] == pytest.approx(frechet_distance(features.control[:120], features.training))
    shift = WIDTH * 0.7**2
    assert figures["FD of encoder features, synthetic"] - figures["FD of encoder features, real"] == pytest.approx(shift, rel=0.35)
    wide = replace(features, **{side: np.repeat(getattr(features, side), 6, axis=1) for side in ("synthetic", "training", "control")})
    verdict = fidelity(wide, GATE, rng=rng)
    assert not any("FD" in name for name in verdict.figures)
    assert "FD of encoder features left out: of 72 features it needs 144 patients and images a side, not 120" in verdict.reason
