"""Does the claim hold on paper, and did the engine do what the accounting assumes?"""

from __future__ import annotations

from dpsynth.checks.evidence import Evidence
from dpsynth.checks.verdict import Outcome, Verdict

QUESTION = "Does the stated epsilon follow from what was booked, and did training keep the bound that it assumes?"
LIMITATION = "It examines the code paths that ran on this machine; it cannot see an attacker who changed both the code and its checks."
ALWAYS = ("moments_noise",)
REQUIRED = (
    "all_parameters_covered",
    "buffers_unchanged",
    "contribution_bounded",
    "gradients_exact",
    "live_contribution_bounded",
    "live_noise_scale",
    "live_sampler_poisson",
    "noise_scale",
    "sampler_poisson",
)


def accounting(evidence: Evidence) -> Verdict:
    """FAIL names every problem; INCONCLUSIVE when a proof of the engine is missing."""
    required = (*ALWAYS, *REQUIRED) if evidence.uses_sgd else ALWAYS
    missing = [name for name in required if name not in evidence.selfcheck]
    failed = [f"{name}: {found['detail']}" for name, found in evidence.selfcheck.items() if not found.get("ok", False)]
    problems = [*evidence.accounting_problems, *evidence.ledger_problems, *failed]
    outcome, reason = Outcome.PASS, "the accountants agree, the ledger is sound, the engine kept its bound"
    if missing:
        outcome, reason = Outcome.INCONCLUSIVE, "no result of: " + ", ".join(missing)
    if problems:
        outcome, reason = Outcome.FAIL, "; ".join(problems)
    return Verdict(
        check="accounting",
        question=QUESTION,
        outcome=outcome,
        statistic_name="problems found",
        statistic=float(len(problems)),
        interval=None,
        threshold=None,
        confidence_level=1 - 1e-6,
        false_alarm_rate=1e-5,
        reason=reason,
        limitation=LIMITATION,
        public=False,
    )
