"""What a plan promises of utility is what was measured, never better for less signal, and says where it comes from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsynth.config import parse_config
from dpsynth.expectations import Expectation, Expectations, load_expectations
from dpsynth.plan import describe, plan


def point(patients: float, epsilon: float, auc: float) -> Expectation:
    return Expectation(patients=patients, epsilon=epsilon, delta=1e-5, auc=auc, precision=auc / 2, coverage=auc / 4)


REAL = Expectation(patients=math.inf, epsilon=math.inf, delta=1, auc=1, precision=0.9, coverage=0.95)
TABLE = Expectations(points=(point(5000, 10, 0.9), point(500, 1, 0.6), point(500, 10, 0.7)), real=REAL)


def test_a_measured_point_is_told_as_it_was_measured_and_beyond_the_ends_nothing_is_made_up() -> None:
    for known in TABLE.points:
        assert TABLE.at(patients=known.patients, epsilon=known.epsilon, delta=1e-5) == known
    assert TABLE.at(patients=10, epsilon=0.5, delta=1e-5).auc == 0.6
    assert TABLE.at(patients=10**6, epsilon=10, delta=1e-5).auc == 0.9
    assert 0.6 < TABLE.at(patients=500, epsilon=3, delta=1e-5).auc < 0.7


def test_a_run_that_happened_to_be_worse_at_more_signal_is_averaged_away() -> None:
    table = Expectations(points=(point(500, 1, 0.7), point(500, 10, 0.6), point(5000, 10, 0.9)), real=REAL)
    assert table.at(patients=500, epsilon=1, delta=1e-5).auc == table.at(patients=500, epsilon=10, delta=1e-5).auc == pytest.approx(0.65)


@settings(max_examples=50, deadline=None)
@given(st.floats(50, 1e5), st.floats(0.2, 20), st.floats(1, 5))
def test_more_patients_or_epsilon_are_never_expected_to_do_worse(patients: float, epsilon: float, factor: float) -> None:
    table = load_expectations()
    now = table.at(patients=patients, epsilon=epsilon, delta=1e-6)
    for more in (
        table.at(patients=patients * factor, epsilon=epsilon, delta=1e-6),
        table.at(patients=patients, epsilon=epsilon * factor, delta=1e-6),
    ):
        assert more.auc >= now.auc
        assert more.precision >= now.precision
        assert more.coverage >= now.coverage


@pytest.mark.parametrize(
    "text", ["method: moments", "data: {spatial_shape: [16, 16, 16]}\nmoments: {low_frequencies: 8}\nrelease: {formats: []}"]
)
def test_nothing_is_told_of_what_was_not_measured(text: str) -> None:
    assert not any(name.startswith("expect") for name, _ in describe(plan(parse_config(text, base=Path.cwd()))))


def test_a_plan_tells_its_own_epsilon_and_others() -> None:
    made = plan(parse_config("privacy: {epsilon: 3}\ndata: {declared_patients: 2000}", base=Path.cwd()))
    rows = dict(describe(made))
    assert "procedural" in rows["expect"]
    assert rows["expect otherwise"].startswith("epsilon 1:")
    assert "epsilon 3:" not in rows["expect otherwise"]
    stored = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert [entry["epsilon"] for entry in stored["expected"]] == [3, 1, 10]
    assert stored["expected"][0]["auc"] <= stored["expected"][2]["auc"] <= 1
