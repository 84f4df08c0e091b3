"""Tests that need Flower's own programs, in the environment that DPSYNTH_FLOWER names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PROGRAMS = Path(os.environ.get("DPSYNTH_FLOWER", ""))
DEPLOYED = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (PROGRAMS / "flower-superlink").is_file(), reason="DPSYNTH_FLOWER does not name Flower's programs"),
]
