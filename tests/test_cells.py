"""Cells: the order of the layout, and target mixes by proportional fitting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsynth.cells import Cells, fit_shares, independent_problem, target_problem
from dpsynth.config import GenerateConfig
from dpsynth.generate import mixed_cells

CELLS = Cells(classes=("normal", "lesion"), attributes=(("sex", ("F", "M")), ("age", ("0-40", "40-120", "unknown"))))
TARGET = {"sex": {"F": 0.5, "M": 0.5}, "label": {"normal": 0.3, "lesion": 0.7}}


def test_every_cell_has_one_index_and_goes_back_to_its_label_and_values() -> None:
    cells = np.arange(len(CELLS))
    labels, values = CELLS.labels(cells), CELLS.values(cells)
    mappings = [{"age": str(values["age"][c]), "sex": str(values["sex"][c]), "site": "A"} for c in cells]
    assert np.array_equal(CELLS.index(labels, mappings), cells)
    seen = {(CELLS.classes[labels[c]], mappings[c]["sex"], mappings[c]["age"]) for c in cells}
    assert len(seen) == 12
    assert CELLS.name(9) == "lesion, sex M, age 0-40"


def test_without_attributes_a_cell_is_a_label() -> None:
    plain = Cells(classes=("a", "b", "c"))
    assert np.array_equal(plain.labels(np.array([2, 0, 1])), [2, 0, 1])
    assert np.array_equal(plain.index(np.array([2, 0, 1]), [{}] * 3), [2, 0, 1])
    assert plain.values(np.array([2, 0])) == {}


priors = st.lists(st.floats(0.001, 1), min_size=12, max_size=12).map(np.array)
shares = st.floats(0.02, 0.98)


@settings(max_examples=60, deadline=None)
@given(priors, shares, shares, st.tuples(shares, shares, shares))
def test_the_fitted_shares_have_the_wanted_marginals(prior: np.ndarray, female: float, normal: float, ages: tuple[float, ...]) -> None:
    age = {name: share / sum(ages) for name, share in zip(("0-40", "40-120", "unknown"), ages, strict=True)}
    target = {"sex": {"M": 1 - female, "F": female}, "label": {"normal": normal, "lesion": 1 - normal}, "age": age}
    found = fit_shares(CELLS, prior, target)
    assert found.min() > 0
    for axis, (name, values) in enumerate(CELLS.axes):
        assert np.allclose(CELLS.marginal(found, axis), [target[name][value] for value in values], atol=1e-6), name


def test_what_no_target_names_keeps_its_association() -> None:
    """Proportional fitting keeps the odds ratios of the prior; a product of marginals would not."""
    prior = np.random.default_rng(0).dirichlet(np.ones(12))
    found = fit_shares(CELLS, prior, TARGET)

    def odds(shares: np.ndarray) -> np.ndarray:
        table = shares.reshape(CELLS.shape)
        return table[0, 0] * table[1, 1] / (table[0, 1] * table[1, 0])

    assert np.allclose(odds(found), odds(prior), rtol=1e-6)
    assert not np.allclose(odds(prior), 1, rtol=0.1)
    assert np.allclose(fit_shares(CELLS, prior, {}), prior)


@settings(max_examples=40, deadline=None)
@given(priors, st.sampled_from([("sex",), ("age",), ("age", "sex")]))
def test_independent_shares_are_those_of_the_weights_that_are_known(prior: np.ndarray, independent: tuple[str, ...]) -> None:
    """Kamiran and Calders: a cell's share times P(label) P(group) / P(label, group), the group of all named attributes together."""
    table = (prior / prior.sum()).reshape(CELLS.shape)
    others = tuple(axis for axis, (name, _) in enumerate(CELLS.axes) if axis and name not in independent)
    joint = table.sum(axis=others, keepdims=True)
    weights = joint.sum(axis=0, keepdims=True) * joint.sum(axis=(1, 2), keepdims=True) / joint
    assert np.allclose(fit_shares(CELLS, prior, {}, independent=independent).reshape(CELLS.shape), table * weights, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(priors, shares, shares)
def test_an_independent_mix_meets_the_targets_too(prior: np.ndarray, female: float, normal: float) -> None:
    target = {
        "sex": {"F": female, "M": 1 - female},
        "label": {"normal": normal, "lesion": 1 - normal},
        "age": {"0-40": 0.2, "40-120": 0.7, "unknown": 0.1},
    }
    found = fit_shares(CELLS, prior, target, independent=("sex",))
    for axis, (name, values) in enumerate(CELLS.axes):
        assert np.allclose(CELLS.marginal(found, axis), [target[name][value] for value in values], atol=1e-6), name
    by_sex = found.reshape(CELLS.shape).sum(axis=2)
    assert np.allclose(by_sex, np.outer(by_sex.sum(axis=1), by_sex.sum(axis=0)), atol=1e-6)


def test_what_cannot_be_independent_is_named() -> None:
    assert "height: unknown attribute, expected one of sex, age" in independent_problem(CELLS, ["sex", "height"])
    assert "none is declared" in independent_problem(Cells(classes=("a", "b")), ["sex"])
    assert independent_problem(CELLS, ["sex", "age"]) == ""


def test_images_are_drawn_with_labels_that_the_group_does_not_tell() -> None:
    prior = np.random.default_rng(3).dirichlet(np.full(12, 0.5)) + 1e-2
    drawn = mixed_cells(GenerateConfig(count=2400, independent=("sex",)), prior / prior.sum(), CELLS)
    by_sex = np.bincount(drawn, minlength=12).reshape(CELLS.shape).sum(axis=2) / 2400
    assert np.allclose(by_sex, np.outer(by_sex.sum(axis=1), by_sex.sum(axis=0)), atol=6 / 2400)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"height": {"tall": 1.0}}, "height: unknown attribute, expected one of label, sex, age"),
        ({"sex": {"F": 0.5, "X": 0.5}}, "sex.X: unknown value, expected F, M"),
        ({"sex": {"F": 1.0}}, "sex: no share for M"),
        ({"sex": {"F": 1.0, "M": 0.0}}, "sex.M: expected a share above 0, found 0"),
        ({"sex": {"F": float("nan"), "M": 0.5}}, "sex.F: expected a share above 0"),
        ({"label": {"normal": 0.5, "lesion": 0.9}}, "label: expected shares that sum to 1, found 1.4"),
    ],
)
def test_a_target_that_cannot_be_drawn_is_named(target: dict[str, dict[str, float]], words: str) -> None:
    assert words in target_problem(CELLS, target)
    assert target_problem(CELLS, TARGET) == ""


@pytest.mark.parametrize("mix", ["balanced", "noisy_prior"])
def test_images_are_drawn_in_the_target_mix_whatever_the_prior(mix: str) -> None:
    prior = np.random.default_rng(1).dirichlet(np.full(12, 0.5)) + 1e-3
    sex = {"F": 0.25, "M": 0.75}
    drawn = mixed_cells(GenerateConfig(count=1200, label_mix=mix, target={"sex": sex}), prior / prior.sum(), CELLS)
    assert len(drawn) == 1200
    shares = np.bincount(drawn, minlength=12) / 1200
    assert np.allclose(CELLS.marginal(shares, 1), [0.25, 0.75], atol=6 / 1200)  # each cell is rounded by less than one image
    expected = [0.5, 0.5] if mix == "balanced" else CELLS.marginal(fit_shares(CELLS, prior, {"sex": sex}), 0)
    assert np.allclose(CELLS.marginal(shares, 0), expected, atol=6 / 1200)
