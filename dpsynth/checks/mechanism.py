"""Is DP-SGD as private as its accounting says? Gradient canaries, before training on a toy net and in the run itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import optimize, stats

from dpsynth.checks.evidence import Evidence
from dpsynth.checks.family import strictest
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig
from dpsynth.privacy.audit import BEFORE, DURING, Audit
from dpsynth.privacy.lower_bounds import mechanism_inverse, one_run_curve_refutes

QUESTION = "Do gradient canaries give away more than the accounting of DP-SGD allows?"
LIMITATION = (
    "It sees noise, clipping and scale on the machine's own code path; it cannot see a sampler that draws others than it should (the "
    "tests of the accounting check do), nor the moments, whose noise is tested directly. A low lower bound is no evidence of privacy."
)
HEADLINE = "one run, curve"
_WHERE = {BEFORE: "before training, on a toy net", DURING: "during training, with this run's own noise and steps"}
_TOLERANCE = 1e-3  # between two computations of one epsilon


def mechanism(evidence: Evidence, gate: GateConfig) -> Verdict:
    """Accuses when an audit refutes the curve of its mechanism, Bonferroni over the two; INCONCLUSIVE when one is missing.

    Without DP-SGD there is nothing to test, which the verdict says; it stops no release."""
    verdict = Verdict.nothing_found(
        "mechanism",
        question=QUESTION,
        statistic_name="lower bound on the epsilon of DP-SGD",
        limitation=LIMITATION,
        false_alarm_rate=gate.family_error,
    )
    if not evidence.uses_sgd:
        reason = "nothing was trained by DP-SGD, so canaries have nothing to test; the noise of the moments is tested in accounting"
        return replace(verdict, tested=False, false_alarm_rate=0.0, confidence_level=0.0, reason=reason)
    missing = [name for name in (BEFORE, DURING) if name not in evidence.canaries]
    if missing:
        return replace(verdict, outcome=Outcome.INCONCLUSIVE, reason=f"no result of the canaries {', '.join(missing)}")
    audits = {name: Audit.from_json(evidence.canaries[name]) for name in (BEFORE, DURING)}
    bounds = {name: audit.lower_bounds(evidence.delta) for name, audit in audits.items()}
    claimed = {name: audit.claimed(evidence.delta) for name, audit in audits.items()}
    if claimed[DURING] > evidence.epsilon * (1 + _TOLERANCE):
        own = f"{claimed[DURING]:.2f}, above the {evidence.epsilon:.2f} of the whole run"
        said = f"the canaries of training are of a mechanism of epsilon {own}"
        return replace(verdict, outcome=Outcome.FAIL, reason=said)
    p = min(1.0, len(audits) * min(audit.p_value() for audit in audits.values()))
    texts = [
        f"{name} epsilon is at least {bounds[name][HEADLINE]:.2f} where {claimed[name]:.2f} is booked for DP-SGD alone" for name in audits
    ]
    figures = {f"{method}, {name}": value for name, found in bounds.items() for method, value in found.items()}
    figures |= {f"booked, {name}": value for name, value in claimed.items()}
    figures |= {f"right guesses of {audit.guesses}, {name}": float(audit.correct) for name, audit in audits.items()}
    power = {name: power_at_half_noise(audit, strictest(gate) / len(audits)) for name, audit in audits.items()}
    figures |= {f"power to see half of the noise, {name}": value for name, value in power.items()}
    seen = " and ".join(f"{value:.2f} {_WHERE[name]}" for name, value in power.items())
    seen = f"half of the noise would have been seen with probability {seen}; {'; '.join(texts)}"
    found = bounds[DURING][HEADLINE]
    return replace(
        verdict,
        reason=f"no evidence (p {p:.2g}); {seen}",
        statistic=found,
        threshold=claimed[DURING],
        figures=figures,
        p_value=p,
        lower_bound=found,
        accusation=f"the canaries give away more than DP-SGD as booked allows: {seen}",
    )


def power_at_half_noise(audit: Audit, level: float) -> float:
    """Probability that an audit of as many canaries, guesses and steps refutes its mechanism at `level` if half of the noise were added.

    Scores are then close to normal, by the sum over the steps: N(0, T s^2 / 4) outside and N(T q, T s^2 / 4 + T q (1 - q)) inside, for T
    steps, sampling probability q and noise multiplier s. Guesses are right independently, as if their thresholds were known.
    """
    mechanism, each = audit.mechanism, audit.guesses / 2 / audit.cases
    steps, chance = mechanism.steps, mechanism.sampling_probability
    variance = steps * mechanism.noise_multiplier**2 / 4
    outside = stats.norm(0, np.sqrt(variance))
    inside = stats.norm(steps * chance, np.sqrt(variance + steps * chance * (1 - chance)))
    ends = min(x.ppf(1e-9) for x in (outside, inside)), max(x.ppf(1 - 1e-9) for x in (outside, inside))
    top = optimize.brentq(lambda t: (outside.sf(t) + inside.sf(t)) / 2 - each, *ends)
    bottom = optimize.brentq(lambda t: (outside.cdf(t) + inside.cdf(t)) / 2 - each, *ends)
    right = float(inside.sf(top) / 2 + outside.cdf(bottom) / 2) / (2 * each)
    inverse = mechanism_inverse((mechanism,))
    low, high = 0, audit.guesses + 1  # the fewest right guesses that refute it lie above `low` and at most at `high`
    while high - low > 1:
        middle = (low + high) // 2
        refuted = one_run_curve_refutes(cases=audit.cases, guesses=audit.guesses, correct=middle, inverse=inverse, failure=level)
        low, high = (low, middle) if refuted else (middle, high)
    return float(stats.binom.sf(high - 1, audit.guesses, min(right, 1.0)))
