"""The table that comes with the package is what the experiment measured."""

from __future__ import annotations

import json
from pathlib import Path

import curves
import pytest

from dpsynth.expectations import PATH


def test_the_table_is_what_the_experiment_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "PATH", tmp_path / "expectations.json")
    curves.write_expectations(json.loads((curves.HERE / "results.json").read_text()))
    assert json.loads((tmp_path / "expectations.json").read_text()) == json.loads(PATH.read_text())
