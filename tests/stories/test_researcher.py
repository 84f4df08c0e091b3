"""The researcher's story through the command line, from an empty folder to a verified release, on phantoms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

CONFIG = """\
method: diffusion
data:
  format: raster
  path: xrays
  name: clinic xrays
  classes: [normal, lesion]
  declared_patients: 500
  control_fraction: 0.3
privacy: {epsilon: 10, delta: 1e-5}
pretrain: {source: phantom, num_phantoms: 300, steps: 15}
diffusion: {steps: 4, sampling_probability: 0.05, draws: 1, channels: [16, 32]}
generate: {count: 150, steps: 6}
gate: {required: [accounting, membership, copying]}
"""


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a researcher has it: PNG files and a table, several images per patient."""
    from dpsynth.data.phantom import phantom_cohort
    from dpsynth.data.raster import write_png

    folder = tmp_path_factory.mktemp("clinic")
    (folder / "xrays").mkdir()
    cohort = phantom_cohort(
        anatomy="chest",
        num_patients=600,
        max_images=2,
        spatial_shape=(28, 28),
        channels=1,
        classes=("normal", "lesion"),
        seed=5,
        name="x",
    )
    rows = ["file,patient_id,label,sex"]
    for index, record in enumerate(cohort.records):
        name = f"image{index:04d}.png"
        write_png(folder / "xrays" / name, record.read().voxels / 127.5 - 1, text={})
        rows.append(f"{name},MRN-{record.patient_id},{cohort.classes[record.label]},{record.attributes['sex']}")
    (folder / "xrays" / "table.csv").write_text("\n".join(rows) + "\n")
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def dpsynth(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in `folder`."""
    command = [sys.executable, "-m", "dpsynth.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False, env={**os.environ})


def must(folder: Path, *arguments: str) -> str:
    """Run a verb that has to work; returns what it printed."""
    result = dpsynth(folder, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_researcher_goes_the_whole_way(clinic: Path) -> None:
    assert "noise multiplier" in must(clinic, "plan", "config.yaml")

    early = dpsynth(clinic, "train", "config.yaml", "--run", "run")
    assert early.returncode == 2
    assert "ledger open" in early.stderr
    assert not (clinic / "run").exists()

    must(clinic, "ledger", "open", "config.yaml", "--epsilon", "10")
    assert "epsilon" in must(clinic, "train", "config.yaml", "--run", "run")
    out_of_order = dpsynth(clinic, "check", "run")
    assert out_of_order.returncode == 2
    assert "generate" in out_of_order.stderr

    must(clinic, "generate", "run")
    must(clinic, "check", "run")
    must(clinic, "report", "run")
    page = (clinic / "run" / "report" / "report.html").read_text()
    assert "<script" not in page
    assert "epsilon" in page

    must(clinic, "key", "keys")
    must(clinic, "release", "run", "out", "--key", "keys/signing.key")
    assert must(clinic, "verify", "out", "--key", "keys/signing.pub").splitlines()[-1] == "true"
    nothing_private_left(clinic)

    second = dpsynth(clinic, "train", "config.yaml", "--run", "run2")
    assert second.returncode == 3
    assert "budget" in second.stderr
    shown = json.loads(must(clinic, "ledger", "show", "xrays.ledger.jsonl", "--format", "json"))
    assert 9 < shown["spent"] <= 10
    found = must(clinic, "ledger", "verify", "xrays.ledger.jsonl", "--release", "out").splitlines()
    assert found[-1] == "true"
    assert "1, epsilon" in found[1]
    assert "its line of the ledger is there" in found[2]

    a_colleague_loads_the_images(clinic / "out")
    target = next((clinic / "out" / "images").iterdir())
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(bytes(content))
    spoiled = dpsynth(clinic, "verify", "out", "--key", "keys/signing.pub")
    assert spoiled.returncode == 3
    assert target.name in spoiled.stdout


def nothing_private_left(clinic: Path) -> None:
    for path in (clinic / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"MRN-" not in content, path.name
            assert str(clinic).encode() not in content, path.name


def a_colleague_loads_the_images(out: Path) -> None:
    (archive,) = out.glob("*.npz")
    with np.load(archive, allow_pickle=False) as arrays:
        images, labels = arrays["train_images"], arrays["train_labels"]
    assert images.shape == (150, 28, 28)
    assert images.dtype == np.uint8
    assert set(labels.ravel().tolist()) <= {0, 1}
