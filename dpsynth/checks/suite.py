"""All checks on one piece of evidence."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import numpy as np

from dpsynth.checks.accounting import accounting
from dpsynth.checks.arms import train_arms
from dpsynth.checks.attributes import attributes
from dpsynth.checks.content import content
from dpsynth.checks.copying import copying
from dpsynth.checks.description import describe
from dpsynth.checks.encoders import encoder_of
from dpsynth.checks.evidence import Evidence, compute_features
from dpsynth.checks.fairness import fairness
from dpsynth.checks.family import decide_family, members
from dpsynth.checks.fidelity import fidelity
from dpsynth.checks.groups import groups
from dpsynth.checks.kept import Keep, keep_nothing
from dpsynth.checks.mechanism import mechanism
from dpsynth.checks.membership import membership, pool_scores
from dpsynth.checks.utility import utility
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.checks.white_box import white_box
from dpsynth.config import GateConfig
from dpsynth.progress import Progress


def run_checks(evidence: Evidence, gate: GateConfig, *, seed: int, progress: Progress, keep: Keep = keep_nothing) -> tuple[Verdict, ...]:
    """One verdict per check, all of them but white_box, which runs when it is required; the privacy checks after Holm.

    A check that breaks is INCONCLUSIVE, never left out. `keep` is asked for what takes long: features, the search for copies and the
    classifiers.
    """
    features = compute_features(evidence, progress=progress, keep=keep, encoder=encoder_of(gate.encoder))

    def rng(number: int) -> np.random.Generator:
        return np.random.default_rng([seed, number])

    scores = cache(lambda: pool_scores(evidence, features))
    arms = cache(lambda: train_arms(evidence, seed=seed, progress=progress, keep=keep))  # several checks look at them
    checks: dict[str, Callable[[], Verdict]] = {
        "accounting": lambda: accounting(evidence),
        "mechanism": lambda: mechanism(evidence, gate),
        "membership": lambda: membership(evidence, gate, scores=scores, rng=rng(1)),
        "copying": lambda: copying(evidence, features, gate, rng=rng(2)),
        "groups": lambda: groups(evidence, features, gate, scores=scores, rng=rng(7)),
        "attributes": lambda: attributes(evidence, features, gate, rng=rng(8)),
        "fidelity": lambda: fidelity(features, gate, rng=rng(3), description=describe(evidence, features, rng=rng(5), progress=progress)),
        "utility": lambda: utility(evidence, gate, arms=arms, rng=rng(4)),
        "fairness": lambda: fairness(evidence, features, gate, arms=arms),
        "content": lambda: content(evidence.screening, gate.content, withheld=evidence.withheld),
    }
    if "white_box" in gate.required:
        checks["white_box"] = lambda: white_box(evidence, gate, rng=rng(9), progress=progress)
    return decide_family([_guarded(name, check) for name, check in checks.items()], gate.family_error, family=members(gate.required))


def _guarded(name: str, check: Callable[[], Verdict]) -> Verdict:
    try:
        verdict = check()
        json.dumps(verdict.to_json(), allow_nan=False)  # a statistic that is no number is no answer
        return verdict
    except Exception as error:  # a broken check must stop a release, not the other checks
        return Verdict(
            check=name,
            question="",
            outcome=Outcome.INCONCLUSIVE,
            statistic_name="none",
            statistic=None,
            interval=None,
            threshold=None,
            confidence_level=0.0,
            false_alarm_rate=0.0,
            reason=f"the check broke ({type(error).__name__}: {error})",
            limitation="It gave no answer.",
        )
