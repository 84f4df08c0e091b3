"""What the tests of the model share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray


@pytest.fixture
def other_signs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes eigenvectors come out with the signs of another machine; LAPACK fixes none."""
    eigh, rng = np.linalg.eigh, np.random.default_rng(7)

    def flipped(matrix: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        values, vectors = eigh(matrix)
        return values, vectors * rng.choice([-1.0, 1.0], size=len(values))

    return lambda: monkeypatch.setattr(np.linalg, "eigh", flipped)
