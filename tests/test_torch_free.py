"""Planning, verifying, reporting and the ledger work on a machine without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCKED = ("torch", "monai", "opacus", "safetensors", "sklearn")
TORCH_FREE_MODULES = (
    "dpsynth.plan",
    "dpsynth.privacy.accountant",
    "dpsynth.privacy.calibrate",
    "dpsynth.privacy.guarantee",
    "dpsynth.privacy.ledger",
    "dpsynth.privacy.noise",
    "dpsynth.checks.verdict",
    "dpsynth.report.epsilon",
    "dpsynth.report.html",
    "dpsynth.release.decision",
    "dpsynth.release.gate",
    "dpsynth.release.bundle",
    "dpsynth.release.mark",
    "dpsynth.release.run",
    "dpsynth.release.verify",
    "dpsynth.signing",
    "dpsynth.artifacts",
)


def run_blocked(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter in which importing torch and its friends raises ImportError."""
    header = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in BLOCKED)
    return subprocess.run([sys.executable, "-c", header + code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("module", TORCH_FREE_MODULES)
def test_torch_free_module_imports_without_torch(module: str) -> None:
    result = run_blocked(f"import {module}")
    assert result.returncode == 0, result.stderr


def test_the_block_itself_works() -> None:
    assert run_blocked("import torch").returncode != 0
    assert run_blocked("import dpsynth.train.run").returncode != 0


@pytest.mark.parametrize("verb", ["plan", "verify", "report", "ledger"])
def test_torch_free_verb_starts_without_torch(verb: str) -> None:
    result = run_blocked(f"sys.argv = ['dpsynth', {verb!r}, '--help']\nfrom dpsynth.cli import main\nmain()")
    assert result.returncode == 0, result.stderr


def test_plan_calibrates_without_torch(tmp_path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("privacy: {epsilon: 3, delta: 1e-5}\n")
    code = (
        f"sys.argv = ['dpsynth', 'plan', {str(config)!r}]\nfrom dpsynth.cli import main\n"
        "try:\n    main()\nfinally:\n    assert not [m for m in sys.modules if m.split('.')[0] == 'torch' and sys.modules[m]]\n"
    )
    result = run_blocked(code)
    assert result.returncode == 0, result.stderr
    assert "noise multiplier" in result.stdout
