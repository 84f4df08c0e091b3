"""Vectors along the principal axes of public ones, weak axes made larger: noise is equal on all axes, so less of it falls on the weak ones.

With equal noise on every axis a release spends the most on the many weak axes; dividing each by a power of its public spread is a
compromise between that and relative noise that is equal everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_SHAPING = 0.25  # power of the public variance that an axis is divided by: 0 is none, 0.5 makes all axes equal
_SMALLEST_PART = 1e-4  # of the mean variance: axes that public images hardly use are not blown up


@dataclass(frozen=True, kw_only=True)
class PrincipalAxes:
    """Public constants. axes: (d, d), in columns; variances: (d,) along them, all positive."""

    axes: Array
    variances: Array

    @classmethod
    def of(cls, residuals: Array, *, smallest: float) -> PrincipalAxes:
        """Of vectors (n, d) around their mean; no variance is below `smallest`, nor below a small part of their mean.

        The largest entry of an axis is positive: sites of a federation find their axes each on its own machine, and add sums along them.
        """
        values, axes = np.linalg.eigh(residuals.T @ residuals / len(residuals))
        axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(len(axes))])
        return cls(axes=axes, variances=np.maximum(values, max(float(values.mean()) * _SMALLEST_PART, smallest)))

    def shaped(self, residuals: Array) -> Array:
        """Vectors (n, d) along the axes."""
        return np.asarray(residuals @ self.axes * self.variances**-_SHAPING)

    def unshaped(self, rows: Array) -> Array:
        """Inverse of `shaped`."""
        return np.asarray((rows * self.variances**_SHAPING) @ self.axes.T)

    @property
    def shaped_variances(self) -> Array:
        """Public variances of shaped vectors, (d,)."""
        return np.asarray(self.variances ** (1 - 2 * _SHAPING))
