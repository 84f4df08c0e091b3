"""The gate fails closed and lists every reason."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from cases import CHECKS, GOOD, GUARANTEE, RELEASE, verdict
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.privacy.mechanism import NonPrivate
from dpsynth.release.gate import Allowed, Refused, decide


def other_verdict(check: str, outcome: Outcome) -> tuple[Verdict, ...]:
    return (*(v for v in GOOD.verdicts if v.check != check), verdict(check, outcome))


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "infinite epsilon": (
        {"guarantee": replace(GUARANTEE, mechanisms=(NonPrivate(reason="x"),), accounting=replace(GUARANTEE.accounting, pld=math.inf))},
        "no privacy guarantee",
    ),
    "stated epsilon too small": (
        {"guarantee": replace(GUARANTEE, accounting=replace(GUARANTEE.accounting, pld=1.0, second_opinion=1.0, rdp=1.2))},
        "not the",
    ),
    "accountants disagree": (
        {"guarantee": replace(GUARANTEE, accounting=replace(GUARANTEE.accounting, second_opinion=GUARANTEE.epsilon * 1.1))},
        "2 %",
    ),
    "no second accountant": (
        {"guarantee": replace(GUARANTEE, accounting=replace(GUARANTEE.accounting, second_opinion=None))},
        "no number",
    ),
    "delta too large": ({"guarantee": replace(GUARANTEE, declared_patients=50_000)}, "delta"),
    "above the configuration": ({"configured_epsilon": 2.0}, "configuration"),
    "above the budget": ({"budget_epsilon": 2.0}, "data owner"),
    "ledger forgets the run": ({"guarantee": replace(GUARANTEE, ledger_epsilon=0.1)}, "less than this run"),
    "the ledger booked something else": ({"booked": (replace(RELEASE, noise_multiplier=2.0),)}, "booked other mechanisms"),
    "the ledger booked nothing": ({"booked": ()}, "booked other mechanisms"),
    "ledger not a number": ({"guarantee": replace(GUARANTEE, ledger_epsilon=math.nan)}, "less than this run"),
    "ledger infinite": ({"spent_epsilon": math.inf}, "data owner"),
    "spent is not a number": ({"spent_epsilon": math.nan}, "data owner"),
    "ledger tampered": ({"ledger_problems": ("line 3",)}, "line 3"),
    "other candidates": ({"candidates_sha256": "b"}, "not those that were checked"),
    "too many attempts": ({"attempt": 4}, "attempt 4"),
    "no attempt": ({"attempt": 0}, "attempt 0"),
    "accounting not even required": ({"required": (), "verdicts": ()}, "accounting"),
    "membership not even required": ({"required": (), "verdicts": ()}, "membership"),
    "a failure of copying that the policy does not require": (
        {"required": ("accounting",), "verdicts": other_verdict("copying", Outcome.FAIL)},
        "copying: fail",
    ),
    "a flag nobody accepted": ({"verdicts": other_verdict("copying", Outcome.FLAG)}, "nobody"),
    "an empty acceptance": ({"verdicts": other_verdict("copying", Outcome.FLAG), "reviews": {"copying": " "}}, "nobody"),
    "a check that the policy requires could not tell": (
        {"required": (*CHECKS, "fidelity"), "verdicts": (*GOOD.verdicts, verdict("fidelity", Outcome.INCONCLUSIVE))},
        "fidelity: inconclusive",
    ),
    "a flag of a check that nobody requires": ({"verdicts": (*GOOD.verdicts, verdict("fairness", Outcome.FLAG))}, "nobody"),
    "a pass beside a fail": ({"verdicts": (*GOOD.verdicts, verdict("copying", Outcome.FAIL))}, "copying: fail"),
}
for name in CHECKS:
    FAULTS[f"{name} missing"] = ({"verdicts": tuple(v for v in GOOD.verdicts if v.check != name)}, f"{name!r} has not run")
    FAULTS[f"{name} fails"] = ({"verdicts": other_verdict(name, Outcome.FAIL)}, f"{name}: fail")
    FAULTS[f"{name} inconclusive"] = ({"verdicts": other_verdict(name, Outcome.INCONCLUSIVE)}, f"{name}: inconclusive")


def test_a_good_case_is_allowed_for_its_candidates_only() -> None:
    assert decide(GOOD) == Allowed(candidates_sha256="a")


@pytest.mark.parametrize("fault", FAULTS)
def test_each_single_fault_is_refused_with_its_reason(fault: str) -> None:
    change, word = FAULTS[fault]
    answer = decide(replace(GOOD, **change))
    assert isinstance(answer, Refused)
    assert any(word in reason for reason in answer.reasons), answer.reasons


@settings(max_examples=25, deadline=None)
@given(
    st.sets(
        st.sampled_from(["above the configuration", "ledger tampered", "other candidates", "too many attempts", "copying fails"]),
        min_size=2,
    )
)
def test_all_reasons_are_listed_together(faults: set[str]) -> None:
    changes: dict[str, Any] = {}
    for fault in faults:
        changes |= FAULTS[fault][0]
    answer = decide(replace(GOOD, **changes))
    assert isinstance(answer, Refused)
    for fault in faults:
        assert any(FAULTS[fault][1] in reason for reason in answer.reasons)


def test_an_accepted_flag_is_allowed_but_an_accepted_failure_is_not() -> None:
    flagged = replace(GOOD, verdicts=other_verdict("copying", Outcome.FLAG), reviews={"copying": "Dr A: looked, a marker"})
    assert isinstance(decide(flagged), Allowed)
    failed = replace(GOOD, verdicts=other_verdict("copying", Outcome.FAIL), reviews={"copying": "Dr A: never mind"})
    assert isinstance(decide(failed), Refused)


def test_an_optional_check_may_fail() -> None:
    assert isinstance(decide(replace(GOOD, verdicts=(*GOOD.verdicts, verdict("fidelity", Outcome.FAIL)))), Allowed)
