"""What a case of the zoo is, and what was found of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import DataConfig, PhantomConfig
from dpsynth.data.cohort import ImageSet
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.progress import silent

HONEST_TWIN = "honest twin"


@dataclass(frozen=True)
class Finding:
    """Whether the named check caught the case (of the twin: whether it accused), and what it said."""

    caught: bool
    said: str


@dataclass(frozen=True)
class Family:
    """cases: name to named check. judge: from a seed to a finding for each case and for each check's honest twin."""

    cases: dict[str, str]
    judge: Callable[[int], dict[str, Finding]]
    repetitions: int = 20

    def twins(self) -> dict[str, str]:
        """The honest twin of each named check."""
        return {f"{HONEST_TWIN}, {check}": check for check in dict.fromkeys(self.cases.values())}


def failed(verdict: Verdict, *, outcome: Outcome = Outcome.FAIL, word: str = "") -> Finding:
    return Finding(verdict.outcome is outcome and word in verdict.reason, verdict.reason)


def accused(verdict: Verdict) -> Finding:
    return Finding(verdict.outcome is not Outcome.PASS, verdict.reason)


def patients(count: int, seed: int, side: int) -> ImageSet:
    config = DataConfig(spatial_shape=(side, side), phantom=PhantomConfig(num_patients=count, max_images=1, seed=seed))
    return prepare(read_cohort(config), config, progress=silent)
