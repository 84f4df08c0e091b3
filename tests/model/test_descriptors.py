import numpy as np
import pytest

from dpsynth.model.descriptors import descriptors


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 14), (1, 4, 4), (1, 7, 9, 11), (1, 28, 28, 28)])
def test_descriptors_of_any_size_are_finite_and_few(shape: tuple[int, ...]) -> None:
    found = descriptors(np.random.default_rng(0).uniform(-1, 1, (3, *shape)).astype(np.float32))
    assert found.shape == (3, 93 if len(shape) == 3 else 191)
    assert np.isfinite(found).all()
    assert np.isfinite(descriptors(np.full((2, *shape), 1.0, dtype=np.float32))).all()
