"""What the generator is conditioned on: cells, the cross product of the label with every declared attribute. Torch-free.

A configuration without attributes has one cell for each label, in the order of the labels. Everything here is public: lists from the
configuration, and arithmetic on numbers that were released with noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Int64 = NDArray[np.int64]

LABEL = "label"
UNKNOWN = "unknown"  # the value of images that have none, where the list declares it
FEWEST_PATIENTS = 50  # in a cell; with fewer the noise of usual budgets hides how the cell differs from its label
_ROUNDS, _TOLERANCE = 1000, 1e-10


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The layout of the cells. attributes: (name, values) in order. The label varies slowest, the last attribute fastest."""

    classes: tuple[str, ...]
    attributes: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def axes(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(name, values) of the label and of each attribute."""
        return ((LABEL, self.classes), *self.attributes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of values on each axis."""
        return tuple(len(values) for _, values in self.axes)

    def __len__(self) -> int:
        return math.prod(self.shape)

    def index(self, labels: Int64, attributes: Sequence[Mapping[str, str]]) -> Int64:
        """Cell of each image, (n,), from its label and its attributes' values."""
        codes = [[values.index(mapping[name]) for mapping in attributes] for name, values in self.attributes]
        axes = (labels, *(np.asarray(code, dtype=np.int64) for code in codes))
        return np.asarray(np.ravel_multi_index(axes, self.shape), dtype=np.int64)

    def labels(self, cells: Int64) -> Int64:
        """Label of each cell, (n,)."""
        return np.asarray(np.unravel_index(cells, self.shape)[0], dtype=np.int64)

    def values(self, cells: Int64) -> dict[str, NDArray[np.str_]]:
        """By attribute the value of each cell, (n,)."""
        codes = np.unravel_index(cells, self.shape)[1:]
        return {name: np.array(values)[code] for (name, values), code in zip(self.attributes, codes, strict=True)}

    def name(self, cell: int) -> str:
        """The cell in words, as in "lesion, sex F"."""
        label, *codes = np.unravel_index(cell, self.shape)
        parts = [f"{name} {values[code]}" for (name, values), code in zip(self.attributes, codes, strict=True)]
        return ", ".join([self.classes[label], *parts])

    def marginal(self, weights: Array, axis: int) -> Array:
        """Sums of the cells' weights (cells,) over all axes but one."""
        return _marginal(weights.reshape(self.shape), (axis,))


def target_problem(cells: Cells, target: Mapping[str, Mapping[str, float]]) -> str:
    """Why a target mix cannot be drawn, in one line; empty when it can."""
    known = dict(cells.axes)
    for name, shares in target.items():
        if name not in known:
            return f"{name}: unknown attribute, expected one of {', '.join(known)}"
        if unknown := [value for value in shares if value not in known[name]]:
            return f"{name}.{unknown[0]}: unknown value, expected {', '.join(known[name])}"
        if missing := [value for value in known[name] if value not in shares]:
            return f"{name}: no share for {missing[0]}; give each of {', '.join(known[name])} one"
        if wrong := [value for value, share in shares.items() if not 0 < share < math.inf]:
            return f"{name}.{wrong[0]}: expected a share above 0, found {shares[wrong[0]]:g}"
        if abs(sum(shares.values()) - 1) > 0.01:
            return f"{name}: expected shares that sum to 1, found {sum(shares.values()):g}"
    return ""


def independent_problem(cells: Cells, independent: Sequence[str]) -> str:
    """Why the label cannot be drawn independent of these, in one line; empty when it can."""
    known = [name for name, _ in cells.attributes]
    unknown = [name for name in independent if name not in known]
    return f"{unknown[0]}: unknown attribute, expected one of {', '.join(known) or 'none, since none is declared'}" if unknown else ""


def fit_shares(cells: Cells, prior: Array, target: Mapping[str, Mapping[str, float]], *, independent: Sequence[str] = ()) -> Array:
    """Shares of the cells, (cells,), with the wanted marginals and otherwise as near to the positive `prior` (cells,) as possible.
    independent: attributes that, together, shall tell nothing about the label.

    Iterative proportional fitting (Deming and Stephan 1940): of all tables with these marginals it finds the one with the smallest
    Kullback-Leibler divergence from the prior, so what no target names keeps its association. What `independent` names gets, with the
    label, the marginal that the weights of Kamiran and Calders (2012) would make; here images are drawn instead of weighted.
    """
    shares = (prior / prior.sum()).reshape(cells.shape)
    names = [name for name, _ in cells.axes]
    wanted: list[tuple[tuple[int, ...], Array]] = [
        ((axis,), np.array([target[name][value] for value in values]) / sum(target[name].values()))
        for axis, (name, values) in enumerate(cells.axes)
        if name in target
    ]
    if independent:
        shares = _fitted(shares, wanted)
        held = tuple(axis for axis in range(1, len(names)) if names[axis] in independent)
        labels, groups = _marginal(shares, (0,)), _marginal(shares, held)
        wanted.append(((0, *held), labels[:, *[None] * len(held)] * groups))
    return np.asarray(_fitted(shares, wanted).ravel())


def _marginal(shares: Array, kept: tuple[int, ...]) -> Array:
    """Sums over all axes but the kept ones."""
    return np.asarray(shares.sum(axis=tuple(axis for axis in range(shares.ndim) if axis not in kept)))


def _fitted(shares: Array, wanted: Sequence[tuple[tuple[int, ...], Array]]) -> Array:
    """The table (by cell) with the wanted sums over all axes but those named, each in rising order."""
    for _ in range(_ROUNDS):
        furthest = 0.0
        for axes, marginal in wanted:
            found = _marginal(shares, axes)
            furthest = max(furthest, float(np.abs(found - marginal).max()))
            whole = [size if axis in axes else 1 for axis, size in enumerate(shares.shape)]
            shares = shares * (marginal / found).reshape(whole)
        if furthest < _TOLERANCE:
            break
    return shares
