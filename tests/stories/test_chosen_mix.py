"""Attributes from a table to a release: an attribute that makes images brighter makes the synthetic ones brighter, and says so."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from cases import GUARANTEE, verdict
from PIL import Image as Pillow

import dpsynth.train.run as train_module
from dpsynth import cli
from dpsynth.artifacts import RunFolder
from dpsynth.checks.run import check
from dpsynth.config import Config, ReleaseConfig, load_config
from dpsynth.data.candidates import Candidates, load_candidates, load_cell_rows
from dpsynth.data.fingerprint import open_ledger
from dpsynth.data.raster import write_png
from dpsynth.errors import LedgerError, UsageError
from dpsynth.generate import Drawn, generate
from dpsynth.model.generator import Generator
from dpsynth.plan import describe, plan
from dpsynth.privacy.ledger import Ledger
from dpsynth.progress import silent
from dpsynth.release.bundle import Release, write_release
from dpsynth.release.gate import Allowed
from dpsynth.report.epsilon import epsilon_report
from dpsynth.report.html import render
from dpsynth.signing import generate_key, load_private

CONFIG = """\
method: METHOD
data:
  format: raster
  path: xrays
  name: clinic
  classes: [normal, lesion]
  attributes: {sex: [F, M], age: {column: age_years, bands: [0, 60, 120]}}
  declared_patients: 400
  spatial_shape: [16, 16]
privacy: {epsilon: 10}
moments: {low_frequencies: 6}
pretrain: {num_phantoms: 200, steps: 4}
diffusion: {steps: 2, sampling_probability: 0.05, draws: 1, channels: [8, 16]}
generate: {count: 240, steps: 4, target: {sex: {F: 0.5, M: 0.5}}}
"""
BRIGHTNESS = {"F": -0.45, "M": 0.35}


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 patients: men are bright and women dark, few are women, and few of them are over 60."""
    folder, rng = tmp_path_factory.mktemp("clinic"), np.random.default_rng(0)
    (folder / "xrays").mkdir()
    rows = ["file,patient_id,label,sex,age_years"]
    ramp = np.linspace(-0.2, 0.2, 16)[None, :, None] * np.ones((1, 16, 16))
    for index in range(400):
        sex, label = "F" if index % 4 == 0 else "M", int(rng.integers(2))
        age = 30 if sex == "F" and index % 8 else int(rng.integers(30, 90))
        image = BRIGHTNESS[sex] + (1 if label else -1) * ramp + rng.normal(0, 0.1, (1, 16, 16)) + rng.normal(0, 0.05)
        write_png(folder / "xrays" / f"i{index}.png", image.astype(np.float32), text={})
        rows.append(f"i{index}.png,P{index},{('normal', 'lesion')[label]},{sex},{age}")
    (folder / "xrays" / "table.csv").write_text("\n".join(rows) + "\n")
    return folder


def trained(clinic: Path, folder: Path, method: str) -> tuple[Config, Path]:
    (clinic / "config.yaml").write_text(CONFIG.replace("METHOD", method))
    config = load_config(clinic / "config.yaml")
    ledger = open_ledger(config, path=folder / "ledger", epsilon=10.0, delta=None, max_gate_attempts=1, progress=silent)
    train_module.train(config, run_path=folder / "run", ledger_path=ledger.path, progress=silent)
    return config, folder / "run"


@pytest.fixture(scope="module", params=["moments", "diffusion"])
def run(request: pytest.FixtureRequest, clinic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "fresh_key", lambda: b"a" * 32)
        return trained(clinic, tmp_path_factory.mktemp(request.param), request.param)[1]


@pytest.fixture
def drawn(run: Path) -> tuple[Drawn, Candidates]:
    return generate(run, progress=silent), load_candidates(RunFolder.open(run))


def brightness(images: np.ndarray) -> np.ndarray:
    return np.asarray(images.astype(float).reshape(len(images), -1).mean(1) / 127.5 - 1)


def test_what_an_attribute_does_to_images_is_seen_in_each_of_its_cells(drawn: tuple[Drawn, Candidates]) -> None:
    candidates = drawn[1]
    found = brightness(candidates.images)
    sex, age = candidates.attributes["sex"], candidates.attributes["age"]
    for label in range(2):
        for band, least in (("0-60", 0.3), ("60-120", 0.05)):  # old women are a dozen a label, and lean on the bright men of theirs
            means = {value: found[(sex == value) & (age == band) & (candidates.labels == label)].mean() for value in "FM"}
            assert means["M"] - means["F"] > least, (label, band, means)
    upright = candidates.images.astype(float).reshape(-1, 16, 16).mean(2)
    slope = upright[:, 12:].mean(1) - upright[:, :4].mean(1)
    assert slope[candidates.labels == 1].mean() > slope[candidates.labels == 0].mean() + 10


def test_the_mix_is_the_target_and_another_can_be_asked_for_when_drawing(run: Path, drawn: tuple[Drawn, Candidates]) -> None:
    assert abs(np.mean(drawn[1].attributes["sex"] == "F") - 0.5) <= 4 / 240
    generate(run, progress=silent, target={"sex": {"F": 0.9, "M": 0.1}, "label": {"normal": 0.25, "lesion": 0.75}})
    other = load_candidates(RunFolder.open(run))
    assert abs(np.mean(other.attributes["sex"] == "F") - 0.9) <= 4 / 240
    assert abs(np.mean(other.labels == 1) - 0.75) <= 4 / 240
    assert RunFolder.open(run).require("generate").facts["target"]["sex"] == {"F": 0.9, "M": 0.1}
    assert generate(run, progress=silent, target={"label": {"normal": 0.25, "lesion": 0.75}, "sex": {"M": 0.1, "F": 0.9}}).already
    generate(run, progress=silent)
    assert not generate(run, progress=silent, independent=["age"]).already, "what else the label depends on is another mix"
    assert generate(run, progress=silent, independent=["age"]).already
    apart = load_candidates(RunFolder.open(run))
    old = apart.attributes["age"] == "60-120"
    assert abs(np.mean(apart.labels[old]) - np.mean(apart.labels[~old])) <= 8 / min(old.sum(), (~old).sum())
    assert list(RunFolder.open(run).require("generate").facts["independent"]) == ["age"]
    with pytest.raises(UsageError, match=r"--independent hair: unknown attribute, expected one of sex, age"):
        generate(run, progress=silent, independent=["hair"])
    with pytest.raises(UsageError, match=r"--target sex\.F: expected a share above 0"):
        generate(run, progress=silent, target={"sex": {"F": 0.0, "M": 1.0}})


def test_cells_with_few_patients_are_named_by_numbers_that_were_released(run: Path, drawn: tuple[Drawn, Candidates]) -> None:
    warnings, rows = drawn[0].warnings, load_cell_rows(RunFolder.open(run))
    generator = Generator.load(run / "train")
    assert [row.noisy_patients for row in rows] == [round(float(count), 1) for count in generator.moments.counts]
    assert sum(row.images for row in rows) == len(drawn[1].images)
    small = [row.name for row in rows if row.noisy_patients < 50 and row.images]
    assert any("sex F, age 60-120" in name for name in small)
    about_cells = [warning for warning in warnings if "noise ±" in warning]
    assert [warning.split(":")[0] for warning in about_cells] == small
    assert all("withheld" in warning for warning in warnings if warning not in about_cells)


def test_attributes_that_were_changed_after_training_are_not_checked(run: Path, clinic: Path) -> None:
    """Else whoever owns the table could give a group that is served badly another name."""
    table = clinic / "xrays" / "table.csv"
    kept, ledger = table.read_text(), run.parent / "ledger"
    generate(run, progress=silent)
    table.write_text(kept.replace("lesion,M,", "lesion,F,", 3))
    try:
        with pytest.raises(LedgerError, match="attributes of the patients are not those"):
            check(run, ledger_path=ledger, progress=silent)
    finally:
        table.write_text(kept)
    assert Ledger.load(ledger).summary()["gate_attempts"] == 0


def test_attributes_stay_with_their_images_in_a_release(
    run: Path, drawn: tuple[Drawn, Candidates], tmp_path: Path, release_of: Callable[[Candidates], Release]
) -> None:
    candidates = drawn[1]
    generate_key(tmp_path / "keys")
    package = release_of(candidates)
    out = write_release(package, out=tmp_path / "out", private=load_private(tmp_path / "keys" / "signing.key"), progress=silent)
    with (out / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "label", "sex", "age", "synthetic", "png"]
    for index, row in enumerate(rows):
        with Pillow.open(out / row["png"]) as picture:
            assert np.array_equal(np.asarray(picture), candidates.images[index, 0])
            assert picture.text["Attributes"] == f"sex {row['sex']}, age {row['age']}"  # type: ignore[attr-defined]
        assert (row["sex"], row["age"]) == (candidates.attributes["sex"][index], candidates.attributes["age"][index])
    with np.load(out / "synthetic.npz", allow_pickle=False) as arrays:
        found = brightness(arrays["train_images"])
        assert found[arrays["train_sex"] == "M"].mean() > found[arrays["train_sex"] == "F"].mean() + 0.3
        assert arrays["train_age"].tolist() == [row["age"] for row in rows]
    card = (out / "README.md").read_text()
    assert "| sex | images |" in card
    assert "`train_age`" in card


@pytest.fixture
def release_of() -> Callable[[Candidates], Release]:
    def make(candidates: Candidates) -> Release:
        return Release(
            allowed=Allowed(candidates_sha256="c"), release_id="ab12", candidates=candidates, candidates_sha256="c",
            classes=("normal", "lesion"), guarantee=GUARANTEE, verdicts=(verdict("copying"),), required=("copying",), reviews={},
            method="moments", report_html="<p>report</p>", ledger_head=(5, "f" * 64), settings=ReleaseConfig(formats=("png",)),
        )  # fmt: skip

    return make


def test_the_report_has_a_table_of_cells(run: Path, drawn: tuple[Drawn, Candidates], release_of: Callable[[Candidates], Release]) -> None:
    package = release_of(drawn[1])
    rows = load_cell_rows(RunFolder.open(run))
    view = epsilon_report(
        guarantee=package.guarantee, verdicts=package.verdicts, required=package.required, decision={"allowed": True, "reasons": []},
        budget={"epsilon": 10.0, "delta": 1e-5, "spent": 1.0, "left": 9.0, "gate_attempts": 1, "max_gate_attempts": 1}, method="moments",
        title="t", count=240, site=False, provenance={}, cells=[asdict(row) for row in rows],
    )  # fmt: skip
    page = render(view, images=drawn[1].images, labels=drawn[1].labels, classes=package.classes)
    assert page.count("! small") == sum(row.noisy_patients < 50 for row in rows) > 0
    for row in rows:
        assert f"<td>{row.name}</td>" in page


def test_a_run_does_not_go_on_with_other_attributes(clinic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of the first attempt would be used for other sums; the difference would show the patient that changed."""

    class Killed(Exception):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "noised_moments", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            trained(clinic, tmp_path, "moments")
    config, table = load_config(clinic / "config.yaml"), clinic / "xrays" / "table.csv"
    before = table.read_text()
    arguments = {"run_path": tmp_path / "run", "ledger_path": tmp_path / "ledger", "progress": silent}
    try:
        table.write_text(before.replace("i5.png,P5,lesion,M", "i5.png,P5,lesion,F").replace("i5.png,P5,normal,M", "i5.png,P5,normal,F"))
        assert table.read_text() != before
        with pytest.raises(LedgerError, match="settings differ"):
            train_module.train(config, **arguments)  # type: ignore[arg-type]
    finally:
        table.write_text(before)
    train_module.train(config, **arguments)  # type: ignore[arg-type]
    assert Ledger.load(tmp_path / "ledger").charges()[0].settled


def test_plan_says_how_many_cells_there_are_and_warns_of_small_ones(clinic: Path) -> None:
    (clinic / "config.yaml").write_text(CONFIG.replace("METHOD", "moments"))
    config = load_config(clinic / "config.yaml")
    found = plan(config)
    assert dict(describe(found))["cells"] == "8 of label, sex, age; on average 40 training patients each"
    assert any("cells of fewer than 50 patients" in warning for warning in found.warnings)
    assert any("method moments are smooth" in warning for warning in found.warnings)
    assert [text for name, text in describe(found) if name == "warning"] == list(found.warnings)
    assert "cells" not in dict(describe(plan(Config(method="moments"))))


@pytest.mark.parametrize(
    ("text", "words"),
    [("sex", "--target NAME=VALUE:SHARE"), ("sex=F:half,M:half", "--target NAME=VALUE:SHARE"), ("sex=F:1", "sex: no share for M")],
)
def test_a_wrong_target_on_the_command_line_is_one_line(
    text: str, words: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["dpsynth", "generate", str(run), "--target", text])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    assert ending.value.code == 2
    line = capsys.readouterr().err.strip()
    assert words in line
    assert len(line.splitlines()) == 1


def test_the_command_line_draws_a_target_and_prints_the_warnings(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["dpsynth", "generate", str(run), "--target", "sex=F:0.75,M:0.25"])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    out = capsys.readouterr().out
    assert ending.value.code == 0
    assert "Warning: normal, sex F, age 60-120" in out
    assert "240 candidates" in out
    assert abs(np.mean(load_candidates(RunFolder.open(run)).attributes["sex"] == "F") - 0.75) <= 4 / 240
    settings = json.loads((run / "train" / "generator.json").read_text())
    assert settings["attributes"] == [["sex", ["F", "M"]], ["age", ["0-60", "60-120"]]]
