"""Planning, verifying, reporting and the ledger work on a machine without torch."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

Run = Callable[[str], subprocess.CompletedProcess[str]]

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
    "federated.officer",
)


@pytest.mark.parametrize("module", TORCH_FREE_MODULES)
def test_torch_free_module_imports_without_torch(module: str, without_torch: Run) -> None:
    result = without_torch(f"import {module}")
    assert result.returncode == 0, result.stderr


def test_the_block_itself_works(without_torch: Run) -> None:
    assert without_torch("import torch").returncode != 0
    assert without_torch("import dpsynth.train.run").returncode != 0


@pytest.mark.parametrize("verb", ["plan", "verify", "report", "ledger"])
def test_torch_free_verb_starts_without_torch(verb: str, without_torch: Run) -> None:
    result = without_torch(f"sys.argv = ['dpsynth', {verb!r}, '--help']\nfrom dpsynth.cli import main\nmain()")
    assert result.returncode == 0, result.stderr


def test_plan_calibrates_without_torch(tmp_path, without_torch: Run) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("privacy: {epsilon: 3, delta: 1e-5}\n")
    code = (
        f"sys.argv = ['dpsynth', 'plan', {str(config)!r}]\nfrom dpsynth.cli import main\n"
        "try:\n    main()\nfinally:\n    assert not [m for m in sys.modules if m.split('.')[0] == 'torch' and sys.modules[m]]\n"
    )
    result = without_torch(code)
    assert result.returncode == 0, result.stderr
    assert "noise multiplier" in result.stdout
