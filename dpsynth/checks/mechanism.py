"""Is DP-SGD as private as its accounting says? Gradient canaries, before training on a toy net and in the run itself."""

from __future__ import annotations

from dataclasses import replace

from dpsynth.checks.evidence import Evidence
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig
from dpsynth.privacy.audit import BEFORE, DURING, Audit

QUESTION = "Do gradient canaries give away more than the accounting of DP-SGD allows?"
LIMITATION = (
    "It sees noise, clipping and scale on the machine's own code path; it cannot see a sampler that draws others than it should (the "
    "tests of the accounting check do), nor the moments, whose noise is tested directly. A low lower bound is no evidence of privacy."
)
HEADLINE = "one run, curve"


def mechanism(evidence: Evidence, gate: GateConfig) -> Verdict:
    """Accuses when an audit refutes the curve of its mechanism, Bonferroni over the two; INCONCLUSIVE when one is missing."""
    blank = Verdict.nothing_found(
        "mechanism",
        question=QUESTION,
        statistic_name="lower bound on the epsilon of DP-SGD",
        limitation=LIMITATION,
        false_alarm_rate=gate.family_error,
    )
    verdict = replace(blank, threshold=None)
    if not evidence.uses_sgd:
        return replace(verdict, reason="nothing was trained by DP-SGD; the noise of the moments is tested by the accounting check")
    missing = [name for name in (BEFORE, DURING) if name not in evidence.canaries]
    if missing:
        return replace(verdict, outcome=Outcome.INCONCLUSIVE, reason=f"no result of the canaries {', '.join(missing)}")
    audits = {name: Audit.from_json(evidence.canaries[name]) for name in (BEFORE, DURING)}
    bounds = {name: audit.lower_bounds(evidence.delta) for name, audit in audits.items()}
    claimed = {name: audit.claimed(evidence.delta) for name, audit in audits.items()}
    p = min(1.0, len(audits) * min(audit.p_value() for audit in audits.values()))
    texts = [
        f"{name} epsilon is at least {bounds[name][HEADLINE]:.2f} where {claimed[name]:.2f} is booked for DP-SGD alone" for name in audits
    ]
    figures = {f"{method}, {name}": value for name, found in bounds.items() for method, value in found.items()}
    figures |= {f"booked, {name}": value for name, value in claimed.items()}
    figures |= {f"right guesses of {audit.guesses}, {name}": float(audit.correct) for name, audit in audits.items()}
    seen = f"half of the noise would have been seen; {'; '.join(texts)}"
    found = bounds[DURING][HEADLINE]
    return replace(
        verdict,
        reason=f"no evidence (p {p:.2g}); {seen}",
        statistic=found,
        threshold=claimed[DURING],
        figures=figures,
        p_value=p,
        lower_bound=found,
        accusation=f"the canaries give away more than DP-SGD as booked allows: {'; '.join(texts)}",
    )
