"""What a check answers. Torch-free, so that the report, the gate and the verifier can read it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VERDICTS = "verdicts.json"  # in the run's folder of checks; its digest is in the ledger


class Outcome(enum.Enum):
    """PASS means no evidence against, never proof."""

    PASS = "pass"  # noqa: S105
    FLAG = "flag"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One answer with its uncertainty.

    `statistic`, `interval` (at `confidence_level`) and `threshold` are in the unit named by `statistic_name`.
    `public` says whether the numbers may leave the site: what is computed on real patients is not covered by epsilon,
    so a non-public verdict leaves as its outcome alone. `limitation` says what the check cannot show. `tested`: whether there was
    anything to test; if not, the numbers mean nothing.
    """

    check: str
    question: str
    outcome: Outcome
    statistic_name: str
    statistic: float
    interval: tuple[float, float]
    threshold: float
    confidence_level: float
    false_alarm_rate: float
    reason: str
    limitation: str
    public: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)
    p_value: float | None = None  # before Holm; none: the check is not one of the family
    accusation: str = ""  # what is said in place of `reason` when Holm rejects
    lower_bound: float | None = None  # on epsilon, as far as this check could see
    tested: bool = True
    listed: tuple[tuple[int, str], ...] = ()  # numbers of synthetic images, and the patient each resembles, for a person at the site

    def to_json(self) -> dict[str, Any]:
        """Everything, for the site's own files."""
        return {
            **self.__dict__,
            "outcome": self.outcome.value,
            "interval": list(self.interval),
            "figures": dict(self.figures),
            "listed": [list(pair) for pair in self.listed],
        }

    def to_public_json(self) -> dict[str, Any]:
        """What may leave: numbers only when the verdict is public."""
        full = self.to_json()
        keep = ("check", "question", "outcome", "limitation", "false_alarm_rate", "public", "tested")
        return full if self.public else {name: full[name] for name in keep}

    @classmethod
    def nothing_found(cls, check: str, *, question: str, statistic_name: str, limitation: str, false_alarm_rate: float) -> Verdict:
        """Of a test by an AUC that has seen nothing yet: what it finds replaces fields."""
        return cls(
            check=check,
            question=question,
            outcome=Outcome.PASS,
            statistic_name=statistic_name,
            statistic=0.5,
            interval=(0.0, 1.0),
            threshold=0.5,
            confidence_level=0.95,
            false_alarm_rate=false_alarm_rate,
            reason="",
            limitation=limitation,
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Verdict:
        """Inverse of `to_json`."""
        interval = (float(value["interval"][0]), float(value["interval"][1]))
        listed = tuple((int(image), str(patient)) for image, patient in value["listed"])
        return cls(**{**value, "outcome": Outcome(value["outcome"]), "interval": interval, "listed": listed})
