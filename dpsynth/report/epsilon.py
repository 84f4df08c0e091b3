"""The epsilon report as plain values: everything that the page shows is computed here, nothing in the template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpsynth import __version__
from dpsynth.cells import FEWEST_PATIENTS
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.privacy.accountant import delta_curve, epsilon_pld, tpr_at_fpr
from dpsynth.privacy.guarantee import Guarantee, round_up
from dpsynth.privacy.mechanism import Mechanism, MomentRelease, PoissonDpSgd

SCHEMA = 1
_FPRS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5)
_CURVE_FPRS = (0.0, 0.001, 0.003, *(step / 50 for step in range(1, 51)))
_SYMBOLS = {Outcome.PASS: "✓", Outcome.FLAG: "!", Outcome.FAIL: "✗", Outcome.INCONCLUSIVE: "?"}
_WORDS = {
    Outcome.PASS: "no evidence against",
    Outcome.FLAG: "a person must look",
    Outcome.FAIL: "evidence against",
    Outcome.INCONCLUSIVE: "could not tell",
}
_NOTHING_TO_TEST = "there was nothing to test"
_NOT_CLAIMED = (
    "That nothing can be learned about patients as a group: that is the purpose of the images.",
    "That attributes of a person cannot be guessed from what is generally true of people like them.",
    "Protection of a patient who appears under two ids, or in the data of two hospitals whose ledgers are kept apart.",
    "Protection against someone who can read the machine on which the images were made while they are made.",
    "Attacks on the low-order bits of floating-point noise.",
    "Any legal status. This report is evidence for those who decide.",
)


def epsilon_report(
    *,
    guarantee: Guarantee,
    verdicts: Sequence[Verdict],
    required: Sequence[str],
    decision: Mapping[str, Any],
    budget: Mapping[str, Any] | None,
    method: str,
    title: str,
    count: int,
    site: bool,
    provenance: Mapping[str, str],
    cells: Sequence[Mapping[str, Any]] = (),
    federation: Mapping[str, Any] | None = None,
    policy: Sequence[Mapping[str, Any]] = (),
    reviews: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The view model. `site=False` makes the public card, in which non-public verdicts keep only their outcome.

    required: names of the checks without which the policy releases nothing. decision: {"allowed": bool, "reasons": [...]}.
    budget: the ledger's {"epsilon", "delta", "spent", "left", "gate_attempts", "max_gate_attempts"}; none when there are several ledgers.
    cells: of a generator with attributes, rows of {"name", "noisy_patients", "stddev", "images"}.
    federation: of images that several hospitals trained: {"sites": a row for each with its word, "uncharged": names of those that were
    asked for nothing, "overlapping": epsilon of a patient whom all hold}.
    policy: rows of `policy_rows`; none of a federation, whose sites have policies of their own. reviews: by flagged check, who accepted it
        and why.
    """
    private = math.isfinite(guarantee.epsilon)
    return {
        "schema": SCHEMA,
        "dpsynth": __version__,
        "title": title,
        "data_name": guarantee.data_name,
        "method": method,
        "images": count,
        "for_site": site,
        "sentence": guarantee.sentence(),
        "private": private,
        "unit": guarantee.unit.value,
        "neighboring_relation": "adding or removing one " + guarantee.unit.value,
        "epsilon": _number(guarantee.epsilon),
        "delta": guarantee.delta,
        "delta_times_patients": guarantee.delta * guarantee.declared_patients,
        "accounting": {
            **guarantee.accounting.to_json(),
            "problems": list(guarantee.problems()) if private else ["no guarantee"],
        },
        "ledger_epsilon": _number(guarantee.ledger_epsilon),
        "budget": None if budget is None else dict(budget) if site else {name: budget[name] for name in ("epsilon", "delta")},
        "mechanisms": [_mechanism(mechanism, guarantee.delta) for mechanism in guarantee.mechanisms],
        "attack_rates": _attack_rates(guarantee),
        "posterior": _posterior(guarantee),
        "delta_profile": _delta_profile(guarantee),
        "curve": _curve(guarantee),
        "unprotected": list(guarantee.unprotected),
        "not_claimed": list(_NOT_CLAIMED),
        "verdicts": [
            {**_verdict(verdict, site=site), "required": verdict.check in required, "accepted": (reviews or {}).get(verdict.check, "")}
            for verdict in verdicts
        ],
        "accepted": sorted(reviews or {}),
        "policy": [dict(row) for row in policy],
        "family": {"checks": [verdict.check for verdict in verdicts if verdict.family], "error": _family_error(verdicts)},
        "lower_bounds": _lower_bounds(verdicts, guarantee) if site else [],
        "cells": [{**row, "small": row["noisy_patients"] < FEWEST_PATIENTS} for row in cells],
        "fewest_patients": FEWEST_PATIENTS,
        **({"sites": [], "uncharged": [], "overlapping": 0.0} if federation is None else federation),
        "decision": dict(decision),
        "provenance": dict(provenance),
    }


def _number(value: float) -> float | str:
    return "inf" if value == math.inf else value


def _mechanism(mechanism: Mechanism, delta: float) -> dict[str, Any]:
    rows: list[tuple[str, str]] = []
    if isinstance(mechanism, MomentRelease):
        name = "Sums over patients with noise, once: class-wise moments, and votes for candidate images if listed"
        rows = [("noise multiplier, all queries together", f"{mechanism.noise_multiplier:.4g}")]
        rows += [
            (f"{q.name}: noise multiplier, clip norm", f"{mechanism.query_noise_multiplier(q.name):.4g}, {q.clip_norm:.4g}")
            for q in mechanism.queries
        ]
    elif isinstance(mechanism, PoissonDpSgd):
        name = "Training steps with clipped, noised gradients (DP-SGD)"
        rows = [
            ("noise multiplier", f"{mechanism.noise_multiplier:.4g}"),
            ("clip norm", f"{mechanism.clip_norm:.4g}"),
            ("sampling probability per step", f"{mechanism.sampling_probability:.4g}"),
            ("steps", str(mechanism.steps)),
            ("expected patients per step", f"{mechanism.expected_batch_size:.4g}"),
        ]
    else:
        name = "Training without privacy"
        rows = [("reason", mechanism.reason)]
    return {"name": name, "rows": rows, "epsilon_alone": _number(epsilon_pld((mechanism,), delta))}


def _attack_rates(guarantee: Guarantee) -> list[dict[str, float]]:
    rates = tpr_at_fpr(guarantee.mechanisms, _FPRS)
    return [
        {"fpr": fpr, "tpr": float(tpr), "wrongly": 1000 * fpr, "rightly": round_up(1000 * float(tpr))}
        for fpr, tpr in zip(_FPRS, rates, strict=True)
    ]


def _posterior(guarantee: Guarantee) -> list[dict[str, float]]:
    """What a test with false positive rate 1 % can make of a suspicion, at best for the attacker."""
    tpr = guarantee.attack_rate(0.01)
    return [{"prior": prior, "after": prior * tpr / (prior * tpr + (1 - prior) * 0.01)} for prior in (0.01, 0.1, 0.5)]


def _delta_profile(guarantee: Guarantee) -> list[dict[str, float]]:
    if not math.isfinite(guarantee.epsilon):
        return []
    epsilons = [round(guarantee.epsilon * part, 3) for part in (0.25, 0.5, 0.75, 1.0, 1.25)]
    return [{"epsilon": e, "delta": float(d)} for e, d in zip(epsilons, delta_curve(guarantee.mechanisms, epsilons), strict=True)]


def _curve(guarantee: Guarantee) -> list[tuple[float, float]]:
    rates = tpr_at_fpr(guarantee.mechanisms, _CURVE_FPRS)
    return [(float(fpr), float(np.clip(tpr, 0, 1))) for fpr, tpr in zip(_CURVE_FPRS, rates, strict=True)]


def _lower_bounds(verdicts: Sequence[Verdict], guarantee: Guarantee) -> list[dict[str, Any]]:
    """Claim and lower bound side by side. The bounds were computed on real patients or canaries and stay at the site."""
    return [
        {"check": verdict.check, "proved": verdict.lower_bound, "claimed": _number(guarantee.epsilon), "limitation": verdict.limitation}
        for verdict in verdicts
        if verdict.lower_bound is not None
    ]


def _family_error(verdicts: Sequence[Verdict]) -> float:
    """Of the privacy checks all together; one that broke states none."""
    return max((verdict.false_alarm_rate for verdict in verdicts if verdict.family), default=0.0)


def _verdict(verdict: Verdict, *, site: bool) -> dict[str, Any]:
    values = verdict.to_json() if site else verdict.to_public_json()
    for name in ("listed", "ratios"):  # patients are named in the run's folder of checks alone
        values.pop(name, None)
    word = _WORDS[verdict.outcome] if verdict.tested else _NOTHING_TO_TEST
    shown = {"symbol": _SYMBOLS[verdict.outcome], "word": word, "numbers": "statistic" in values}
    return {"not_judged": [], **values, **shown}
