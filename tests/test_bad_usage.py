"""What a user gets wrong: one clear line on stderr, exit code 2, no traceback, nothing written half. Through the command line itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpsynth import cli
from dpsynth.config import Config, dump_config, parse_config
from dpsynth.data.raster import write_png
from dpsynth.errors import ConfigError
from dpsynth.signing import key_id, load_public

RASTER = "data: {format: raster, path: xrays, name: clinic, classes: [normal, lesion], declared_patients: 500}\n"


class Result:
    """Exit code and output of one call."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def refused(self, *words: str) -> None:
        """It ended as a user error should, and the line names what is wrong."""
        assert self.code == 2, (self.code, self.out, self.err)
        line = [line for line in self.err.splitlines() if line.startswith("dpsynth: ")]
        assert len(line) == 1, self.err
        assert "Traceback" not in self.err
        for word in words:
            assert word in line[0], line[0]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["dpsynth", *arguments])
        with pytest.raises(SystemExit) as ending:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(ending.value.code or 0), captured.out, captured.err)

    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CONFIGS = {
    "an unknown key": ("epsylon: 3\n", ["epsylon", "unknown setting"]),
    "an unknown key inside": ("privacy: {epsilon: 3, sigma: 1}\n", ["privacy.sigma", "unknown setting"]),
    "a negative epsilon": ("privacy: {epsilon: -1}\n", ["privacy.epsilon", "greater than 0"]),
    "an epsilon of zero": ("privacy: {epsilon: 0}\n", ["privacy.epsilon"]),
    "an infinite epsilon": ("privacy: {epsilon: .inf}\n", ["privacy.epsilon"]),
    "an epsilon that is no number": ("privacy: {epsilon: .nan}\n", ["privacy.epsilon"]),
    "words for a number": ("privacy: {epsilon: ten}\n", ["privacy.epsilon", "ten"]),
    "a delta that is too large": ("privacy: {delta: 0.01}\n", ["delta"]),
    "a delta of one": ("privacy: {delta: 1}\n", ["privacy.delta"]),
    "a delta in words": ("privacy: {delta: 1e-5x}\n", ["privacy.delta"]),
    "broken YAML": ("privacy: {epsilon: 3\n", ["not valid YAML", "line"]),
    "a list": ("- epsilon\n", ["mapping"]),
    "a format without a path": ("data: {format: raster}\n", ["path"]),
    "MedMNIST at patient level": ("data: {format: medmnist, path: x.npz}\n", ["unit: image"]),
    "a class twice": ("data: {classes: [a, a]}\n", ["classes"]),
    "no class": ("data: {classes: []}\n", ["data.classes"]),
    "a size that the net cannot take": ("data: {spatial_shape: [30, 30]}\n", ["multiple of 4"]),
    "volumes as PNG": ("data: {spatial_shape: [16, 16, 16]}\nmoments: {low_frequencies: 6}\n", ["png"]),
    "more low frequencies than pixels": ("moments: {low_frequencies: 40}\n", ["low_frequencies"]),
    "a noise level at which nothing is left to draw": ("generate: {sigma_min: 0.6}\n", ["sigma_min"]),
    "a required check that does not exist": ("gate: {required: [magic]}\n", ["magic"]),
    "fairness without attributes": ("gate: {required: [fairness]}\n", ["gate.required: fairness", "data.attributes", "nothing could ever"]),
    "utility of one class": ("data: {classes: [lesion]}\n", ["gate.required: utility", "data.classes has one"]),
    "a word for a list": ("gate: {required: fairness}\n", ["gate.required: expected a list, as in [fairness] (found 'fairness')"]),
    "a list for settings": ("gate: [fairness]\n", ["gate: expected settings with names", "['fairness']"]),
    "a word for settings by name": ("data: {attributes: sex}\n", ["data.attributes: expected settings with names", "'sex'"]),
    "a sampling probability above one": ("diffusion: {sampling_probability: 1.5}\n", ["sampling_probability"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrong_configuration_is_named(name: str, call: Callable[..., Result], tmp_path: Path) -> None:
    text, words = CONFIGS[name]
    (tmp_path / "config.yaml").write_text(text)
    before = snapshot(tmp_path)
    call("plan", "config.yaml").refused(*words)
    assert snapshot(tmp_path) == before


def test_numbers_as_yaml_writes_them_are_understood(call: Callable[..., Result], tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-5 as text; people write it all the same."""
    (tmp_path / "config.yaml").write_text("method: moments\nprivacy: {epsilon: 1e1, delta: 1e-5}\n")
    result = call("plan", "config.yaml", "--format", "json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["delta"] == 1e-5
    assert json.loads(result.out)["epsilon"] == 10.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan"], ["CONFIG"]),
        (["plan", "nothing.yaml"], ["nothing.yaml"]),
        (["plan", "."], ["readable YAML"]),
        (["pln", "x"], ["pln"]),
        (["plan", "config.yaml", "--format", "xml"], ["xml"]),
        (["ledger", "show", "none.jsonl"], ["none.jsonl"]),
        (["ledger", "verify", "none.jsonl"], ["none.jsonl"]),
        (["ledger", "open", "config.yaml", "--epsilon", "many"], ["--epsilon", "number"]),
        (["ledger", "open", "config.yaml", "--epsilon", "-3"], ["above 0"]),
        (["generate", "norun"], ["norun"]),
        (["check", "norun"], ["norun"]),
        (["report", "norun"], ["norun"]),
        (["release", "norun", "out", "--key", "keys/none.key"], ["keys/none.key", "found no file"]),
        (["verify", "nofolder", "--key", "keys/none.pub"], ["keys/none.pub", "found no file"]),
        (["verify", "nofolder", "--key", "config.yaml"], ["config.yaml", "found another file"]),
        (["release", "norun", "out", "--key", "none.key", "--accept", "copying"], ["--accept"]),
        (["train", "config.yaml"], ["--run"]),
        (["train", "config.yaml", "--run", "run"], ["ledger open"]),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], words: list[str], call: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("method: moments\ndata: {phantom: {num_patients: 30}, declared_patients: 30}\n")
    before = snapshot(tmp_path)
    call(*arguments).refused(*words)
    assert {name for name in snapshot(tmp_path) if not name.endswith(".lock")} == set(before)


@pytest.fixture
def clinic(tmp_path: Path) -> Path:
    """A small folder of images that would be accepted."""
    folder, rng = tmp_path / "xrays", np.random.default_rng(0)
    folder.mkdir()
    rows = ["file,patient_id,label"]
    for index in range(30):
        write_png(folder / f"i{index:02d}.png", rng.uniform(-1, 1, (1, 16, 16)).astype(np.float32), text={})
        rows.append(f"i{index:02d}.png,P{index},{'lesion' if index % 2 else 'normal'}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "config.yaml").write_text(RASTER)
    return folder


def _truncate(folder: Path) -> None:
    path = folder / "i03.png"
    path.write_bytes(path.read_bytes()[:60])


def _constant(folder: Path) -> None:
    write_png(folder / "i03.png", np.zeros((1, 16, 16), dtype=np.float32), text={})


def _colour(folder: Path) -> None:
    write_png(folder / "i03.png", np.random.default_rng(0).uniform(-1, 1, (3, 16, 16)).astype(np.float32), text={})


def _larger(folder: Path) -> None:
    write_png(folder / "i03.png", np.random.default_rng(0).uniform(-1, 1, (1, 16, 24)).astype(np.float32), text={})


def _edit(old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        table = folder / "table.csv"
        table.write_text(table.read_text().replace(old, new))

    return edit


def _one_patient_class(folder: Path) -> None:
    table = folder / "table.csv"
    lines = table.read_text().replace("lesion", "normal").splitlines()
    lines[4] = lines[4].replace("normal", "lesion")
    table.write_text("\n".join(lines) + "\n")


FOLDERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "an empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], ["table.csv"]),
    "a truncated image": (_truncate, ["i03.png"]),
    "a constant image": (_constant, ["i03.png", "constant"]),
    "a colour image among grey ones": (_colour, ["i03.png", "channels"]),
    "an image of another size": (_larger, ["i03.png", "16x24", "mixed_sizes"]),
    "no row for an image": (_edit("i03.png,P3,lesion\n", ""), ["i03.png"]),
    "two rows for an image": (_edit("i04.png,P4", "i03.png,P4"), ["i03.png"]),
    "a class with one patient": (_one_patient_class, ["lesion", "1 patients"]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bad_folder_opens_no_ledger(name: str, call: Callable[..., Result], clinic: Path, tmp_path: Path) -> None:
    spoil, words = FOLDERS[name]
    spoil(clinic)
    call("ledger", "open", "config.yaml", "--epsilon", "5").refused(*words)
    assert not list(tmp_path.glob("*.jsonl*"))


def test_data_that_changed_after_the_ledger_was_opened_trains_nothing(call: Callable[..., Result], clinic: Path, tmp_path: Path) -> None:
    assert call("ledger", "open", "config.yaml", "--epsilon", "5").code == 0
    before = snapshot(tmp_path)
    _truncate(clinic)
    spoiled = snapshot(tmp_path)
    call("train", "config.yaml", "--run", "run").refused("i03.png")
    assert snapshot(tmp_path) == spoiled
    (clinic / "i03.png").write_bytes(before["xrays/i04.png"])
    call("train", "config.yaml", "--run", "run").refused("ledger")
    assert not (tmp_path / "run").exists()
    call("ledger", "data-changed", "config.yaml", "--because", "image 3 was broken").refused("WHO: WHY")
    assert call("ledger", "data-changed", "config.yaml", "--because", "Dr B: image 3 was broken").code == 0
    (shown,) = [name for name in snapshot(tmp_path) if name.endswith("ledger.jsonl")]
    assert "changed   the data; Dr B: image 3 was broken" in call("ledger", "show", shown).out
    call("ledger", "data-changed", "config.yaml", "--because", "Dr B: again").refused("nothing to note")


ENCODER = "gate: {encoder: {path: nets/nowhere.onnx, sha256: " + "a" * 64 + "}}\n"


def test_an_encoder_that_is_not_there_is_known_before_anything_is_charged(
    call: Callable[..., Result], clinic: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(RASTER + ENCODER)
    path = str(tmp_path / "nets" / "nowhere.onnx")
    planned = call("plan", "config.yaml")
    assert planned.code == 0
    assert any(line.startswith("warning") and path in line and "no file" in line for line in planned.out.splitlines())
    assert path in json.loads(call("plan", "config.yaml", "--format", "json").out)["missing"]
    assert call("ledger", "open", "config.yaml", "--epsilon", "5").code == 0
    before = snapshot(tmp_path)
    call("train", "config.yaml", "--run", "run").refused("gate.encoder.path", path, "found no file")
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "nowhere.onnx").write_bytes(b"another net")
    call("train", "config.yaml", "--run", "run").refused("gate.encoder.path", path, "SHA-256 aaaaaaaaaaaa")
    assert snapshot(tmp_path) == before | {"nets/nowhere.onnx": b"another net"}


def test_a_reader_of_text_that_is_not_installed_is_known_before_anything_is_charged(
    call: Callable[..., Result], clinic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (clinic.parent / "config.yaml").write_text(RASTER + "gate: {content: {text: ocr}}\n")
    assert call("ledger", "open", "config.yaml", "--epsilon", "5").code == 0
    monkeypatch.setattr("dpsynth.policy_needs.find_spec", lambda _: None)
    call("train", "config.yaml", "--run", "run").refused("gate.content.text", "dpsynth[ocr]")
    assert not (clinic.parent / "run").exists()


def test_a_private_key_in_place_of_a_public_one_is_named(call: Callable[..., Result], tmp_path: Path) -> None:
    made = call("key", "keys")
    assert made.code == 0
    assert key_id(load_public(tmp_path / "keys" / "signing.pub")) in made.out, "people compare it by telephone"
    call("verify", "nofolder", "--key", "keys/signing.key").refused("public Ed25519 key", "keys/signing.key", "found a private key")
    call("release", "norun", "out", "--key", "keys/signing.pub").refused("keys/signing.pub", "found a public key")


def test_a_run_folder_of_another_version_is_refused(call: Callable[..., Result], clinic: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"schema_version": 99, "dpsynth": "9.0"}')
    (tmp_path / "run" / "config.yaml").write_text(RASTER)
    call("generate", "run").refused("schema version 1, found 99")
    assert call("ledger", "open", "config.yaml", "--epsilon", "5").code == 0
    before = snapshot(tmp_path)
    call("train", "config.yaml", "--run", "run").refused("schema version 1, found 99")
    assert snapshot(tmp_path) == before


def test_a_folder_with_other_files_is_not_taken_for_a_run(call: Callable[..., Result], clinic: Path, tmp_path: Path) -> None:
    assert call("ledger", "open", "config.yaml", "--epsilon", "5").code == 0
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("ten years of work")
    call("train", "config.yaml", "--run", "run").refused("other files")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "ten years of work"


yaml_like = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(width=32) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=60) | st.builds(lambda value: json.dumps({"privacy": value, "data": {"classes": value}}), yaml_like))
def test_any_text_is_a_configuration_or_a_configuration_error(text: str) -> None:
    with suppress(ConfigError):
        assert isinstance(parse_config(text, base=Path("/")), Config)


def test_a_configuration_survives_writing_and_reading() -> None:
    config = parse_config(RASTER + "privacy: {epsilon: 1e-1}\nmethod: moments\n", base=Path("/somewhere"))
    again = parse_config(dump_config(config), base=Path("/elsewhere"))
    assert again == config
    assert again != Config()


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="epsilon is set twice"):
        parse_config("privacy:\n  epsilon: 1\n  epsilon: 10\n", base=Path("/"))


def test_a_ledger_without_limit_is_shown(call: Callable[..., Result], clinic: Path) -> None:
    assert call("ledger", "open", "config.yaml", "--epsilon", "inf", "--ledger", "free.jsonl").code == 0
    shown = call("ledger", "show", "free.jsonl")
    assert shown.code == 0
    call("ledger", "open", "config.yaml", "--epsilon", "1", "--ledger", "xrays").refused("found a folder")
    call("ledger", "open", "config.yaml", "--epsilon", "1", "--max-gate-attempts", "0", "--ledger", "none.jsonl").refused("at least one")
