"""Sheets show what was drawn, in the order in which it was drawn."""

from __future__ import annotations

import numpy as np
import pytest
from sheets import line, sheet


@pytest.mark.parametrize("depth", [(), (5,)])
def test_a_line_holds_the_first_images_of_each_class(depth: tuple[int, ...]) -> None:
    labels = np.array([1, 0] * 8)
    images = np.zeros((16, 1, *depth, 4, 4), dtype=np.uint8)
    images[:] = np.arange(16).reshape(-1, *([1] * (images.ndim - 1)))
    if depth:
        images[:, :, [0, 1, 3, 4]] = 99  # all but the middle slice
    shown = line(images, labels, 2)
    assert shown.shape == (4, 2 * 6 * 4 + 4)
    assert shown[0, : 6 * 4 : 4].tolist() == [1, 3, 5, 7, 9, 11]
    assert shown[0, 6 * 4 + 4 :: 4].tolist() == [0, 2, 4, 6, 8, 10]


def test_a_sheet_has_a_line_for_each_name() -> None:
    pixels = line(np.zeros((4, 1, 8, 8), dtype=np.uint8), np.array([0, 1, 0, 1]), 2)
    assert sheet({"a": pixels, "b": pixels}, 3).size == (110 + pixels.shape[1] * 3, 2 * 24 + 4)
