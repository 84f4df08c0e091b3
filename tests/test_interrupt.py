"""Ctrl-C on a real process: one line that says what becomes of the charge, exit code 130, from all three commands."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

_WAIT = """
import importlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the parent ignores
def wait(*_, **__):
    print("begun", flush=True)
    time.sleep(60)
module, name = {place!r}.rsplit(".", 1)
setattr(importlib.import_module(module), name, wait)
sys.argv = {arguments!r}
importlib.import_module({command!r}).main()
"""


@pytest.mark.parametrize(
    ("command", "arguments", "place"),
    [
        ("dpsynth.cli", ["dpsynth", "plan", "config.yaml"], "dpsynth.config.load_config"),
        ("dpsynth.cli", ["dpsynth", "train", "config.yaml", "--run", "run"], "dpsynth.train.run.train"),
        ("federated.cli", ["dpsynth-site", "ledger", "policy.yaml"], "federated.policy.load_policy"),
        ("federated.coordinator_cli", ["dpsynth-federation", "status", "folder", "study"], "federated.progress_view.progress_of"),
    ],
)
def test_ctrl_c_says_what_stays_charged_and_how_to_go_on(command: str, arguments: list[str], place: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {declared_patients: 5000}\n")  # of which nothing is to be warned
    code = _WAIT.format(command=command, arguments=arguments, place=place)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines() == [f"{arguments[0]}: {_SAID}"]


_SAID = "Stopped. What was reserved stays charged; the same command resumes, or begins again where it had kept nothing."
