"""What several test files share."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Callable

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, so each computes with one thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")

BLOCKED = ("torch", "monai", "opacus", "safetensors", "sklearn", "einops")
_HEADER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Nets that a test makes begin with weights of its own seed, whatever ran before it and on whichever core."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def without_torch() -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs code in an interpreter in which importing torch and what needs it raises ImportError."""

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", _HEADER + code], capture_output=True, text=True, timeout=120, check=False)

    return run
