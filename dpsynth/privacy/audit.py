"""What an audit of DP-SGD by gradient canaries showed, and what follows for epsilon (Nasr et al. 2023, arXiv 2302.07956; Dirac canaries).

A canary is a patient who does not exist: a gradient along a direction of its own, ten times too long, that takes part when its fair coin
says so. Its score is the sum of the noised gradients along that direction, in clip norms. No canary touches a weight or stands for a
person, so the audit costs no privacy; how well the scores tell which coins fell how says how private the mechanism is at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.lower_bounds import (
    Calls,
    clopper_pearson_epsilon,
    gdp_epsilon,
    gdp_mu,
    mechanism_inverse,
    one_run_curve_epsilon,
    one_run_curve_p_value,
    one_run_curve_refutes,
    one_run_epsilon,
)
from dpsynth.privacy.mechanism import PoissonDpSgd, from_json, to_json

CANARIES = "canaries.json"  # in the site's part of the run folder: the two audits by name
BEFORE, DURING = "before training", "during training"
_GUESSED = 0.1  # of the canaries, half of them with the highest scores, half with the lowest


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Guesses of canaries of `mechanism`: `correct` of `guesses` right by rank, and the errors of a threshold fixed beforehand."""

    mechanism: PoissonDpSgd
    cases: int
    guesses: int
    correct: int
    calls: Calls

    def p_value(self) -> float:
        """That the mechanism is at least as private as the accountant says, from its whole curve and this one run."""
        inverse = mechanism_inverse((self.mechanism,))
        return one_run_curve_p_value(cases=self.cases, guesses=self.guesses, correct=self.correct, inverse=inverse)

    def refuted(self, failure: float) -> bool:
        """Whether the p-value is below `failure`."""
        inverse = mechanism_inverse((self.mechanism,))
        return one_run_curve_refutes(cases=self.cases, guesses=self.guesses, correct=self.correct, inverse=inverse, failure=failure)

    def claimed(self, delta: float) -> float:
        """Epsilon of the mechanism alone."""
        return epsilon_pld((self.mechanism,), delta)

    def lower_bounds(self, delta: float) -> dict[str, float]:
        """Epsilon at least, by name of the method; each fails with probability 0.05. Those of GDP hold for mechanisms close to it."""
        guessed = {"cases": self.cases, "guesses": self.guesses, "correct": self.correct}
        return {
            "Clopper-Pearson": clopper_pearson_epsilon(self.calls, delta=delta),
            "GDP": gdp_epsilon(gdp_mu(self.calls), delta),
            "one run": one_run_epsilon(**guessed, delta=delta),
            "one run, curve": one_run_curve_epsilon(**guessed, delta=delta),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "mechanism": to_json(self.mechanism)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Audit:
        """Inverse of `to_json`. Raises ValueError for a mechanism of another kind."""
        mechanism = from_json(value["mechanism"])
        if not isinstance(mechanism, PoissonDpSgd):
            raise ValueError(f"Expected an audit of DP-SGD, got one of {mechanism.kind}.")
        return cls(**{**value, "mechanism": mechanism, "calls": Calls(**value["calls"])})


def outcome(scores: NDArray[np.float64], inside: NDArray[np.bool_], mechanism: PoissonDpSgd) -> Audit:
    """Guess who is inside from scores (n,) in clip norms. The threshold is half of what a canary inside collects on average."""
    each = max(1, round(_GUESSED * len(scores) / 2))
    order = np.argsort(-scores, kind="stable")
    correct = int(inside[order[:each]].sum() + (~inside[order[-each:]]).sum())
    called = scores > mechanism.steps * mechanism.sampling_probability / 2
    calls = Calls(
        false_positives=int((called & ~inside).sum()),
        negatives=int((~inside).sum()),
        false_negatives=int((~called & inside).sum()),
        positives=int(inside.sum()),
    )
    return Audit(mechanism=mechanism, cases=len(scores), guesses=2 * each, correct=correct, calls=calls)
