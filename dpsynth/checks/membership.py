"""Can someone who sees only the synthetic images tell who of the audit pool was in training?

Score of a patient: log distance to the nearest other real patient minus log distance to the nearest synthetic image, a density ratio as in
DOMIAS (van Breugel et al. 2023), in two spaces fixed beforehand, of which the more suspicious counts. No score depends on the
coins, so flipping the coins again gives the exact null; and the same coins give a lower bound on epsilon from this one run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsynth.checks.evidence import Bool, Evidence, Features
from dpsynth.checks.family import strictest
from dpsynth.checks.statistics import auc_interval, coin_flip_p, nearest, only_above, smallest_detectable_auc, standardised
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig
from dpsynth.privacy.lower_bounds import one_run_epsilon

Array = NDArray[np.float64]
QUESTION = "Can the synthetic images tell who of the audit pool was trained on?"
LIMITATION = (
    "It is one attack, from the images alone, on average over patients, and looks at one image of each: single copied patients, what shows "
    "in a patient's other images alone and stronger attacks can escape it; the differential privacy bound is what limits those. Its lower "
    "bound on epsilon says what the attack has shown, not how much there is."
)
_GUESSED = 0.1  # of the pool, those with the highest scores, are called in


def pool_scores(evidence: Evidence, features: Features) -> Array:
    """Membership score of each patient of the pool, (n,); higher means nearer to the synthetic images than expected."""
    spaces = (
        (np.concatenate([features.training, features.control]), features.synthetic),
        (np.concatenate([features.training_thumbnails, features.control_thumbnails]), features.synthetic_thumbnails),
    )
    return np.asarray(np.max([standardised(density_ratio(real, synthetic, evidence.pool)) for real, synthetic in spaces], axis=0))


def density_ratio(real: Array, synthetic: Array, pool: NDArray[np.int64]) -> Array:
    """Log distance to the nearest other real row minus log distance to the nearest synthetic one, of the `pool` rows of `real`."""
    to_real, to_synthetic = nearest(real[pool], real, own=pool)[0], nearest(real[pool], synthetic)[0]
    return np.asarray(np.log(to_real + 1e-9) - np.log(to_synthetic + 1e-9))


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What the scores showed: p-value under the coins, AUC with interval, lower bound on epsilon, smallest visible AUC."""

    p: float
    auc: float
    low: float
    high: float
    epsilon: float
    guesses: int
    correct: int
    detectable: float


def attack(scores: Array, inside: Bool, *, delta: float, level: float, rng: np.random.Generator) -> Attack:
    """Test scores of patients who are inside by a fair coin each. Both sides must have somebody."""
    auc, low, high = auc_interval(scores[inside], scores[~inside], 0.95)
    guesses = max(1, round(_GUESSED * len(scores)))
    order = np.lexsort((rng.random(len(scores)), -scores))  # equal scores in random order: the pool lists those in training first
    correct = int(inside[order[:guesses]].sum())
    return Attack(
        p=coin_flip_p(scores, inside, rng=rng, level=level),
        auc=auc,
        low=low,
        high=high,
        epsilon=one_run_epsilon(cases=len(scores), guesses=guesses, correct=correct, delta=delta),
        guesses=guesses,
        correct=correct,
        detectable=smallest_detectable_auc(int(inside.sum()), int((~inside).sum()), false_alarm_rate=level),
    )


def membership(evidence: Evidence, gate: GateConfig, *, scores: Callable[[], Array], rng: np.random.Generator) -> Verdict:
    """Accuses when the coins explain the scores too badly; INCONCLUSIVE when too few patients could show anything.

    `scores` computes `pool_scores`, which other checks look at as well.
    """
    inside, level = evidence.inside, strictest(gate)
    found = attack(scores(), inside, delta=evidence.delta, level=level, rng=rng)
    bound = f"epsilon is at least {found.epsilon:.2f} by this attack, {evidence.epsilon:.2f} is claimed"
    seen = f"an AUC of {found.detectable:.2f} would have been seen"
    outcome, reason = Outcome.PASS, f"no evidence (AUC {found.auc:.3f}, p {found.p:.2g}); {seen}; {bound}"
    if found.detectable > gate.largest_membership_auc:
        outcome, reason = (
            Outcome.INCONCLUSIVE,
            f"with {int((~inside).sum())} pool patients outside training {only_above(found.detectable)}",
        )
    refuted = ", which refutes the claim" if found.epsilon > evidence.epsilon else ""
    return Verdict(
        check="membership",
        question=QUESTION,
        outcome=outcome,
        statistic_name="AUC of the membership score",
        statistic=found.auc,
        interval=(found.low, found.high),
        threshold=None,
        confidence_level=0.95,
        false_alarm_rate=gate.family_error,
        reason=reason,
        limitation=LIMITATION,
        figures={
            "smallest detectable AUC": found.detectable,
            "pool, in": float(inside.sum()),
            "pool, out": float((~inside).sum()),
            "guesses": float(found.guesses),
            "right guesses": float(found.correct),
            "epsilon at least": found.epsilon,
        },
        p_value=found.p,
        accusation=f"training patients lie nearer to the synthetic images than chance allows (AUC {found.auc:.3f}); {seen}; "
        f"{bound}{refuted}",
        lower_bound=found.epsilon,
    )
