"""What a check answers. Torch-free, so that the report, the gate and the verifier can read it."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERDICTS = "verdicts.json"  # in the run's folder of checks; its digest is in the ledger
CONTENT = "content.json"  # every decision of the filters, a line an image; withheld ones beside the candidates, the others here
REVIEW = "review.html"  # beside it: what a person is asked to look at


class Outcome(enum.Enum):
    """PASS means no evidence against, never proof."""

    PASS = "pass"  # noqa: S105
    FLAG = "flag"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One answer with its uncertainty.

    `statistic`, `interval` (at `confidence_level`) and `threshold` are in the unit named by `statistic_name`; each is None where there is
    none.
    `public` says whether the numbers may leave the site: what is computed on real patients is not covered by epsilon,
    so a non-public verdict leaves as its outcome alone. `limitation` says what the check cannot show. `tested`: whether there was
    anything to test; if not, the numbers mean nothing.
    """

    check: str
    question: str
    outcome: Outcome
    statistic_name: str
    statistic: float | None
    interval: tuple[float, float] | None
    threshold: float | None
    confidence_level: float
    false_alarm_rate: float
    reason: str
    limitation: str
    public: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)
    p_value: float | None = None  # before Holm; none: the check is not one of the family
    accusation: str = ""  # what is said in place of `reason` when Holm rejects
    lower_bound: float | None = None  # on epsilon, as far as this check could see
    family: bool = False  # `false_alarm_rate` is of all the checks together for which this is true
    tested: bool = True
    listed: tuple[tuple[int, str], ...] = ()  # numbers of synthetic images, and the patient each resembles, for a person at the site
    ratios: tuple[float, ...] = ()  # of each listed image: distance to that patient as part of that to the nearest other one
    not_judged: tuple[str, ...] = ()  # groups of patients that are too small

    def to_json(self) -> dict[str, Any]:
        """Everything, for the site's own files."""
        return {
            **self.__dict__,
            "outcome": self.outcome.value,
            "interval": None if self.interval is None else list(self.interval),
            "figures": dict(self.figures),
            "listed": [list(pair) for pair in self.listed],
            "ratios": list(self.ratios),
            "not_judged": list(self.not_judged),
        }

    def to_public_json(self) -> dict[str, Any]:
        """What may leave: numbers only when the verdict is public."""
        full = self.to_json()
        keep = ("check", "question", "outcome", "limitation", "false_alarm_rate", "family", "public", "tested")
        return full if self.public else {name: full[name] for name in keep}

    def line(self) -> str:
        """For a terminal at the site."""
        return f"{self.check:<12} {self.outcome.value:<13} {self.reason}"

    @classmethod
    def nothing_found(cls, check: str, *, question: str, statistic_name: str, limitation: str, false_alarm_rate: float) -> Verdict:
        """Of a test by an AUC that has seen nothing yet: what it finds replaces fields."""
        return cls(
            check=check,
            question=question,
            outcome=Outcome.PASS,
            statistic_name=statistic_name,
            statistic=None,
            interval=None,
            threshold=None,
            confidence_level=0.95,
            false_alarm_rate=false_alarm_rate,
            reason="",
            limitation=limitation,
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Verdict:
        """Inverse of `to_json`."""
        given = value["interval"]
        read = {
            "outcome": Outcome(value["outcome"]),
            "interval": None if given is None else (float(given[0]), float(given[1])),
            "listed": tuple((int(image), str(patient)) for image, patient in value["listed"]),
            "ratios": tuple(float(ratio) for ratio in value.get("ratios", ())),
            "not_judged": tuple(str(group) for group in value.get("not_judged", ())),
        }
        return cls(**{**value, **read})


def look_at(verdicts: Sequence[Verdict], page: Path) -> str:
    """What a person at the site does after a check."""
    flagged = ", ".join(verdict.check for verdict in verdicts if verdict.outcome is Outcome.FLAG)
    asked = f"A person must look, since {flagged} is flagged" if flagged else "A sample to look at"
    return f"{asked}: {page}. It is for the site alone and must not leave."
