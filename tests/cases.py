"""A release with which nothing is wrong, for tests that spoil one thing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.privacy.accountant import account
from dpsynth.privacy.guarantee import Guarantee
from dpsynth.privacy.mechanism import GaussianQuery, MomentRelease
from dpsynth.privacy.unit import PrivacyUnit
from dpsynth.release.gate import Question

RELEASE = MomentRelease(noise_multiplier=1.0, queries=(GaussianQuery(name="a", share=1.0, clip_norm=1.0),))
CHECKS = ("accounting", "mechanism", "membership", "copying")


def verdict(check: str, outcome: Outcome = Outcome.PASS) -> Verdict:
    return Verdict(
        check=check, question="?", outcome=outcome, statistic_name="s", statistic=0.0, interval=(0.0, 1.0), threshold=1.0,
        confidence_level=0.95, false_alarm_rate=0.01, reason="because", limitation="much",
    )  # fmt: skip


def numbers_of(verdict: Mapping[str, Any]) -> list[str]:
    """What a stored verdict measured, as it would be printed, if it has three digits or more: shorter ones come by chance elsewhere."""
    found = (verdict["statistic"], *(verdict["interval"] or ()), *verdict["figures"].values(), *verdict["ratios"])
    printed = [f"{number:.4g}" for number in found if number is not None]
    return [text for text in printed if len(text.split("e")[0].replace(".", "").strip("-0")) >= 3]


def guarantee() -> Guarantee:
    accounting = account([RELEASE], 1e-5, second_opinion=lambda mechanisms, delta: account(mechanisms, delta, second_opinion=None).pld)
    return Guarantee(
        data_name="x", unit=PrivacyUnit.PATIENT, declared_patients=500, mechanisms=(RELEASE,), accounting=accounting,
        ledger_epsilon=accounting.pld, max_images_per_patient=8, unprotected=(),
    )  # fmt: skip


GUARANTEE = guarantee()
GOOD = Question(
    guarantee=GUARANTEE, booked=(RELEASE,), budget_epsilon=6.0, spent_epsilon=5.0, configured_epsilon=6.0, ledger_problems=(),
    verdicts=tuple(verdict(c) for c in CHECKS),
    required=CHECKS, attempt=1, max_attempts=3, checked_sha256="a", candidates_sha256="a", reviews={},
)  # fmt: skip
