"""From a trained run to a release through the verbs: whoever edits the run folder, the gate hears what the ledger says."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import numbers_of
from PIL import Image as Pillow
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import dpsynth.checks.evidence as evidence_module
import dpsynth.checks.run as checks_run
from dpsynth.artifacts import RunFolder, write_json
from dpsynth.checks import arms, kept, search, suite
from dpsynth.cli import app
from dpsynth.config import load_config
from dpsynth.data.candidates import load_candidates, save_candidates, to_8_bit
from dpsynth.data.fingerprint import open_ledger
from dpsynth.data.phantom import phantom_cohort
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.data.split import split_patients
from dpsynth.errors import ArtifactError, BudgetExceeded, DpsynthError, GateRefused, LedgerError, StorageError, UsageError
from dpsynth.generate import generate
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.mechanism import PoissonDpSgd
from dpsynth.progress import silent
from dpsynth.release.decision import load_case
from dpsynth.release.metadata import require_expected_metadata
from dpsynth.release.run import refuse, release, report
from dpsynth.release.verify import ledger_anchor, verify
from dpsynth.signing import generate_key
from dpsynth.train.run import train

CONFIG = """\
method: moments
data:
  {format: raster, path: xrays, name: clinic, classes: [normal, lesion], declared_patients: 300, control_fraction: 0.3,
   spatial_shape: [16, 16]}
privacy: {epsilon: 10}
moments: {low_frequencies: 6}
pretrain: {num_phantoms: 100}
generate: {count: 100}
gate: {required: [accounting]}
"""
OTHER_MIX = {"label": {"normal": 0.4, "lesion": 0.6}}
COPIED = (12, 31, 77)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small clinic and one run of it, trained, drawn and checked once."""
    folder = tmp_path_factory.mktemp("clinic")
    (folder / "xrays").mkdir()
    rows = ["file,patient_id,label"]
    cohort = phantom_cohort(
        anatomy="chest", num_patients=300, max_images=1, spatial_shape=(16, 16), channels=1, classes=("normal", "lesion"), seed=5, name="x"
    )
    for index, record in enumerate(cohort.records):
        Pillow.fromarray(record.read().voxels[0].astype(np.uint8)).save(folder / "xrays" / f"i{index:03d}.png")
        rows.append(f"i{index:03d}.png,MRN-{record.patient_id},{cohort.classes[record.label]}")
    (folder / "xrays" / "table.csv").write_text("\n".join(rows) + "\n")
    (folder / "config.yaml").write_text(CONFIG)
    config = load_config(folder / "config.yaml")
    open_ledger(config, path=folder / "ledger", epsilon=10.0, delta=None, max_gate_attempts=2, progress=silent)
    with pytest.MonkeyPatch.context() as patch:  # a fixed key: one honest run in fifty is stopped by a false alarm
        patch.setattr("dpsynth.train.run.fresh_key", lambda: b"u" * 32)
        train(config, run_path=folder / "run", ledger_path=folder / "ledger", progress=silent)
    generate(folder / "run", progress=silent)
    notes: list[str] = []
    checks_run.check(folder / "run", ledger_path=folder / "ledger", progress=silent, note=notes.append)
    assert notes == ["Attempt 1 of 2."]
    generate_key(folder / "keys")
    return folder


@pytest.fixture
def clinic(checked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil. The configuration names its images by an absolute path, so the copy is put in the original's place."""
    kept = tmp_path / "kept"
    shutil.copytree(checked, kept)
    yield checked
    shutil.rmtree(checked)
    shutil.copytree(kept, checked)


def let_out(clinic: Path, ledger: str = "ledger", reviews: Mapping[str, str] | None = None) -> Path:
    return release(
        clinic / "run",
        out=clinic / "out",
        key_path=clinic / "keys" / "signing.key",
        ledger_path=clinic / ledger,
        reviews=reviews or {},
        progress=silent,
    )


def test_images_that_the_policy_rejects_are_withheld_when_drawn_and_counted(clinic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is blank, one is a double. What is left is what the check sees, and no private image was opened."""
    honest = load_candidates(RunFolder.open(clinic / "run"))
    spoilt = replace(honest, images=honest.images.copy())
    spoilt.images[7], spoilt.images[40] = 128, spoilt.images[12]
    monkeypatch.setattr("dpsynth.generate.draw", lambda *_, **__: spoilt)
    monkeypatch.setattr("dpsynth.data.raster.read_image", None)
    drawn = generate(clinic / "run", progress=silent, target=OTHER_MIX)
    assert drawn.count == 98
    assert "2 of 100 drawn images were withheld (contrast 1, similarity 1)" in drawn.warnings[0]
    left = load_candidates(RunFolder.open(clinic / "run"))
    np.testing.assert_array_equal(left.seeds, np.delete(honest.seeds, [7, 40]))
    log = json.loads((clinic / "run" / "generate" / "content.json").read_text())
    assert [(row["index"], row["grounds"]) for row in log] == [(7, ["contrast"]), (40, ["similarity"])]
    spoilt.images[:] = 128
    with pytest.raises(GateRefused, match="rejects all 100"):
        generate(clinic / "run", progress=silent)
    assert generate(clinic / "run", progress=silent, target=OTHER_MIX).already, "what was drawn before stays"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def no_warning(text: str) -> None:
    raise AssertionError(text)


def test_drawing_again_with_the_same_settings_changes_nothing(clinic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of what was drawn cost an attempt; a second `generate` must not throw it away."""
    before = contents(clinic / "run")
    monkeypatch.setattr("dpsynth.generate.draw", None)
    drawn = generate(clinic / "run", progress=silent, warn=no_warning)
    assert (drawn.count, drawn.already) == (100, True)
    said = CliRunner().invoke(app, ["generate", str(clinic / "run")])
    assert "Already drawn with these settings" in said.stdout
    assert f"Next: dpsynth report {clinic / 'run'}" in said.stdout
    assert contents(clinic / "run") == before


@pytest.mark.parametrize("change", ["another mix", "another version"])
def test_another_draw_says_that_the_check_goes_while_it_is_still_there(clinic: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    before, seen = contents(clinic / "run"), []
    if change == "another version":
        monkeypatch.setattr("dpsynth.generate.__version__", "0.0.0")

    def warn(text: str) -> None:
        assert contents(clinic / "run") == before
        seen.append(text)

    drawn = generate(clinic / "run", progress=silent, target=OTHER_MIX if change == "another mix" else None, warn=warn)
    assert not drawn.already
    assert len(seen) == 1
    assert "another attempt at the gate" in seen[0]
    assert not (clinic / "run" / "check").exists()
    with pytest.raises(ArtifactError, match="dpsynth check"):
        let_out(clinic)


def test_the_warning_goes_to_the_person_and_only_when_a_check_is_there(clinic: Path) -> None:
    for warned, share in ((True, "0.9"), (False, "0.8")):
        said = CliRunner().invoke(app, ["generate", str(clinic / "run"), "--target", f"label=normal:{share},lesion:{1 - float(share)}"])
        assert said.exit_code == 0, said.output
        assert ("Warning: this run was checked" in said.stderr) == warned
        assert f"Next: dpsynth check {clinic / 'run'}" in said.stdout


def test_a_draw_that_is_stopped_keeps_what_was_checked(clinic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(clinic / "run")

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpsynth.generate.screen_candidates", stopped)
    with pytest.raises(KeyboardInterrupt):
        generate(clinic / "run", progress=silent, target=OTHER_MIX)
    assert contents(clinic / "run") == before
    assert let_out(clinic).is_dir()


@pytest.mark.parametrize("fault", ["no record", "no candidates", "a flipped byte", "another training"])
def test_a_half_written_or_spoilt_draw_is_drawn_again(clinic: Path, fault: str) -> None:
    folder, before = clinic / "run" / "generate", contents(clinic / "run" / "generate")
    if fault == "no record":
        (folder / "stage.json").unlink()
    elif fault == "no candidates":
        (folder / "candidates.npz").unlink()
    elif fault == "a flipped byte":
        content = bytearray(before["candidates.npz"])
        content[len(content) // 2] ^= 1
        (folder / "candidates.npz").write_bytes(bytes(content))
    else:
        edit_json(clinic / "run" / "train" / "stage.json", lambda value: value["facts"].update(other=True))
    assert not generate(clinic / "run", progress=silent).already
    assert contents(folder)["candidates.npz"] == before["candidates.npz"]
    assert RunFolder.open(clinic / "run").require("generate").facts["count"] == 100


def with_copies(clinic: Path) -> list[np.ndarray]:
    """Three candidates become images of training patients; their pixels."""
    run, config = RunFolder.open(clinic / "run"), load_config(clinic / "config.yaml")
    images = prepare(read_cohort(config.data), config.data, progress=silent)
    training = set(json.loads((clinic / "run" / "train" / "site" / "split.json").read_text())["training"])
    rows = [row for row, patient in enumerate(images.patients) if images.patient_ids[patient] in training][: len(COPIED)]
    candidates = load_candidates(run)
    candidates.images[list(COPIED)] = to_8_bit(images.images[rows])
    save_candidates(run, candidates)
    run.complete("generate", needs=("train",), facts={"count": 100})
    return [candidates.images[number, 0] for number in COPIED]


def test_a_person_is_shown_what_was_flagged_on_a_page_that_no_release_can_carry(clinic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "train_and_predict", quick)
    monkeypatch.setattr(checks_run, "require_drawn", lambda *_, **__: None)
    copies, page = with_copies(clinic), clinic / "run" / "check" / "review.html"
    said = CliRunner().invoke(app, ["check", str(clinic / "run"), "--ledger", str(clinic / "ledger")])
    assert f"A person must look, since copying is flagged: {page}. It is for the site alone and must not leave." in said.stdout
    assert page.stat().st_mode & 0o777 == 0o600
    text = page.read_text()
    pairs = text.partition("<h2>Images that come very near")[2].partition("</table>")[0]
    shown = [np.asarray(Pillow.open(io.BytesIO(base64.b64decode(found)))) for found in re.findall(r'base64,([^"]+)', pairs)]
    numbers = [int(found) for found in re.findall(r'alt="Synthetic image (\d+)"', pairs)]
    record = json.loads((clinic / "run" / "check" / "verdicts.json").read_text())
    (listed,) = (verdict["listed"] for verdict in record["verdicts"] if verdict["check"] == "copying")
    assert numbers == [number for number, _ in listed]
    assert re.findall(r"patient (MRN-\w+):", pairs) == [patient for _, patient in listed]
    for number, copy in zip(COPIED, copies, strict=True):
        at = 2 * numbers.index(number)
        for picture in shown[at : at + 2]:  # the copy, and the patient whose image it is
            np.testing.assert_array_equal(picture, copy)
    assert (
        f"dpsynth release {clinic / 'run'} OUT --key KEY --ledger {clinic / 'ledger'} \\\n    --accept &#39;copying=NAME: WHY&#39;" in text
    )
    with pytest.raises(GateRefused, match=r"copying: flagged, and nobody has accepted it \(look at check/review.html first\)"):
        let_out(clinic)
    out = let_out(clinic, reviews={"copying": "Dr A: planted by a test"})
    (decided,) = Ledger.load(clinic / "ledger").decisions()
    assert (decided["decision"], decided["words"]) == ("released", {"copying": "Dr A: planted by a test"})
    card = (out / "report.html").read_text()
    assert "since a person accepted what was flagged: copying" in card
    assert "accepted by Dr A: planted by a test" in card
    for name, content in contents(out).items():
        assert "review" not in name
        assert b"MRN-" not in content, name
        assert b"Patient beside" not in content, name
    for name in ("manifest.json", "manifest.dsse.json"):  # they come after the look at what was written
        (out / name).unlink()
    require_expected_metadata(out, ())
    shutil.copy(page, out / page.name)
    with pytest.raises(GateRefused, match=r"review\.html: an unexpected file name"):
        require_expected_metadata(out, ())


def refused_by_dr_b(clinic: Path) -> None:
    refuse(clinic / "run", ledger_path=clinic / "ledger", who="Dr B", why="image 3 is my patient")


@pytest.mark.parametrize("act", [let_out, refused_by_dr_b])
def test_what_is_noted_between_question_and_decision_stops_the_decision(
    clinic: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], object]
) -> None:
    """A refusal, or a charge that the claim would not hold."""

    def slow(*given: Any, **options: Any) -> Any:
        case = load_case(*given, **options)
        case.ledger.record_verdicts("another run", "0" * 64)
        return case

    monkeypatch.setattr("dpsynth.release.run.load_case", slow)
    with pytest.raises(LedgerError, match="noted in the ledger meanwhile"):
        act(clinic)
    assert not Ledger.load(clinic / "ledger").decisions()
    assert not (clinic / "out").exists()


def test_a_release_that_cannot_be_written_is_not_noted(clinic: Path) -> None:
    """Else its decision would stand in the ledger for good, and once more with each try."""
    (clinic / "file").write_text("no folder")
    with pytest.raises(StorageError):
        release(
            clinic / "run",
            out=clinic / "file" / "out",
            key_path=clinic / "keys" / "signing.key",
            ledger_path=clinic / "ledger",
            reviews={},
            progress=silent,
        )
    assert not Ledger.load(clinic / "ledger").decisions()


def test_two_checks_at_once_are_one_too_many(clinic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one has computed of its images would be taken for the other's."""

    def meanwhile(*_: object, **__: object) -> None:
        monkeypatch.setattr(checks_run, "run_checks", lambda *_, **__: pytest.fail("two at once"))
        with pytest.raises(ArtifactError, match="being checked already"):
            checks_run.check(clinic / "run", ledger_path=clinic / "ledger", progress=silent)
        raise KeyboardInterrupt

    monkeypatch.setattr(checks_run, "run_checks", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        checks_run.check(clinic / "run", ledger_path=clinic / "ledger", progress=silent)


def test_a_person_who_refuses_is_heard_for_good_and_for_these_images_alone(clinic: Path) -> None:
    run, ledger = str(clinic / "run"), str(clinic / "ledger")
    with pytest.raises(UsageError, match="WHO: WHY"):
        CliRunner().invoke(app, ["refuse", run, "--because", "no name", "--ledger", ledger], catch_exceptions=False)
    assert not Ledger.load(clinic / "ledger").decisions()
    said = CliRunner().invoke(app, ["refuse", run, "--because", "Dr B: image 3 is my patient", "--ledger", ledger])
    assert said.exit_code == 0, said.output
    with pytest.raises(GateRefused, match=r"refused by a person \(Dr B: image 3 is my patient\)"):
        let_out(clinic)
    assert "refused   images" in CliRunner().invoke(app, ["ledger", "show", ledger]).stdout
    assert "Dr B: image 3 is my patient" in report(clinic / "run", ledger_path=clinic / "ledger").read_text()
    assert Ledger.load(clinic / "ledger").refusal("0" * 64) == ""
    generate(clinic / "run", progress=silent, target=OTHER_MIX)
    checks_run.check(clinic / "run", ledger_path=clinic / "ledger", progress=silent)
    case = load_case(clinic / "run", ledger_path=clinic / "ledger", reviews={})
    assert not case.question.refusal, "that was said of other images"


def test_a_release_says_by_which_policy_it_was_judged(clinic: Path) -> None:
    out = let_out(clinic)
    rows = {row["setting"]: row for row in json.loads((out / "verdicts.json").read_text())["policy"]}
    assert (rows["required"]["value"], rows["required"]["changed"]) == ("accounting, mechanism, membership, copying", True)
    assert (rows["utility_margin"]["value"], rows["utility_margin"]["changed"]) == ("0.1", False)
    assert rows["content.saturated"]["default"] == "0.5, 0.9"
    page = (out / "report.html").read_text()
    assert "in places not what dpsynth asks by itself" in page
    assert "! accounting" in page


def seal(clinic: Path, stage: str) -> None:
    """Make the stage's record fit its files again, as someone who owns the run folder can."""
    run = RunFolder.open(clinic / "run")
    for name in ("train", "generate", "check")[("train", "generate", "check").index(stage) :]:
        record = run.path / name / "stage.json"
        if record.exists():
            old = json.loads(record.read_text())
            run.complete(name, needs=tuple(old["needs"]), facts=old["facts"])


def edit_json(path: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


def test_the_honest_run_is_released_and_nothing_computed_on_patients_leaves(clinic: Path) -> None:
    out = let_out(clinic)
    assert verify(out, clinic / "keys" / "signing.pub") == []
    assert Ledger.problems_of(clinic / "ledger", anchor=ledger_anchor(out)) == []
    record = json.loads((clinic / "run" / "check" / "verdicts.json").read_text())
    split = json.loads((clinic / "run" / "train" / "site" / "split.json").read_text())
    claimed = set(re.findall(r"\d+\.\d+", (clinic / "run" / "train" / "guarantee.json").read_text()))  # written before any check ran
    secrets, numbers = ["MRN-", str(clinic), "must not leave", f"draw of {len(split['control'])}"], []
    for verdict in record["verdicts"]:
        assert verdict["public"] == (verdict["check"] == "content"), "only what reads no patient may leave with its numbers"
        if verdict["public"]:
            continue
        secrets.append(verdict["reason"])
        if verdict["check"] != "accounting":
            numbers += numbers_of(verdict)
    for path in out.rglob("*"):
        if path.is_file() and path.suffix in {".json", ".html", ".md", ".csv", ".txt"}:
            text = path.read_text()
            for secret in secrets:
                assert secret not in text, (path.name, secret)
            text = re.sub(r' d="[^"]*"', "", text)  # the coordinates of curves hold any four digits sooner or later
            text = re.sub(r"\d+\.\d+", lambda found: "" if found[0] in claimed else found[0], text)
            for number in (number for number in numbers if len(number) > 4):
                assert not re.search(r"(?<![\d.])" + re.escape(number), text), (path.name, number)
    page = report(clinic / "run", ledger_path=clinic / "ledger").read_text()
    assert "must not leave" in page


def lower_epsilon(clinic: Path) -> None:
    def change(value: dict) -> None:  # type: ignore[type-arg]
        value["mechanisms"][0]["noise_multiplier"] *= 4

    edit_json(clinic / "run" / "train" / "guarantee.json", change)
    seal(clinic, "train")


def other_weights(clinic: Path) -> None:
    """Moments of the very patients, without noise, in place of those that were released."""
    path = clinic / "run" / "train" / "weights.safetensors"
    arrays = load_file(path)
    save_file({name: array + array.dtype.type(0.1) for name, array in arrays.items()}, path)
    seal(clinic, "train")


def a_better_proof(clinic: Path) -> None:
    edit_json(clinic / "run" / "train" / "site" / "selfcheck.json", lambda value: value.update(more={"ok": True}))
    seal(clinic, "train")


def other_images(clinic: Path) -> None:
    run = RunFolder.open(clinic / "run")
    candidates = load_candidates(run)
    save_candidates(run, replace(candidates, images=255 - candidates.images))
    seal(clinic, "generate")


def a_better_verdict(clinic: Path) -> None:
    edit_json(
        clinic / "run" / "check" / "verdicts.json", lambda value: value["verdicts"][1].update(outcome="pass", reason="nothing at all")
    )
    seal(clinic, "check")


def verdicts_left_out(clinic: Path) -> None:
    edit_json(clinic / "run" / "check" / "verdicts.json", lambda value: value.update(verdicts=value["verdicts"][:1]))
    seal(clinic, "check")


def too_many_attempts(clinic: Path) -> None:
    ledger = Ledger.load(clinic / "ledger")
    (charge,) = ledger.charges()
    for _ in range(3):
        ledger._append("gate", {"run_id": charge.run_id}, lines=ledger._sound())


def a_spoilt_ledger(clinic: Path) -> None:
    content = (clinic / "ledger").read_bytes()
    (clinic / "ledger").write_bytes(content.replace(b'"unit":"patient"', b'"unit":"image"'))


def charges_above_the_budget(clinic: Path) -> None:
    ledger = Ledger.load(clinic / "ledger")
    line = next(line.entry for line in ledger._sound() if line.entry and line.entry["type"] == "reserve")
    fields = {name: line[name] for name in ("purpose", "run_id", "config_sha256", "mechanisms")}
    ledger._append("reserve", {**fields, "reservation": "second"}, lines=ledger._sound())


def a_milder_policy(clinic: Path) -> None:
    """The run's configuration, and the digest of it that lies beside it."""
    path = clinic / "run" / "config.yaml"
    path.write_text(path.read_text().replace("family_error: 0.05", "family_error: 0.001"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_json(clinic / "run" / "run.json", lambda value: value.update(config_sha256=digest))
    assert "family_error: 0.001" in RunFolder.open(clinic / "run").config_text


def another_review_page(clinic: Path) -> None:
    path = clinic / "run" / "check" / "review.html"
    path.write_text(path.read_text().replace("Review of", "Nothing to see in"))
    seal(clinic, "check")


def a_detector_that_nobody_checked(clinic: Path) -> None:
    (clinic / "run" / "generate" / "detector.json").write_text("{}")
    seal(clinic, "generate")


def another_list_of_decisions(clinic: Path) -> None:
    (clinic / "run" / "check" / "content.json").write_text("[]")
    seal(clinic, "check")


def other_counts_of_cells(clinic: Path) -> None:
    (clinic / "run" / "generate" / "cells.json").write_text("[]")
    seal(clinic, "generate")


def a_policy_cut_short(clinic: Path) -> None:
    """What is cut off from the configuration is put before the conditions, so that one after the other they read as before."""
    path, booking = clinic / "run" / "config.yaml", clinic / "run" / "train" / "site" / "reservation.json"
    text = path.read_text()
    kept = text[: text.index("  - accounting\n") + len("  - accounting\n")]
    path.write_text(kept)
    edit_json(clinic / "run" / "run.json", lambda value: value.update(config_sha256=hashlib.sha256(kept.encode()).hexdigest()))
    edit_json(booking, lambda value: value.update(conditions=text[len(kept) :] + value["conditions"]))
    seal(clinic, "train")
    assert "fidelity" not in RunFolder.open(clinic / "run").config_text


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        (another_review_page, "not those of the check"),
        (a_detector_that_nobody_checked, "not those of the check"),
        (another_list_of_decisions, "not those of the check"),
        (other_counts_of_cells, "not those of the check"),
        (a_policy_cut_short, "configuration of this run is not the one that the ledger noted"),
        (a_milder_policy, "configuration of this run is not the one that the ledger noted"),
        (lower_epsilon, "not the one that the ledger noted when training ended"),
        (other_weights, "not the one that the ledger noted when training ended"),
        (a_better_proof, "not the one that the ledger noted when training ended"),
        (other_images, "not those that were checked"),
        (a_better_verdict, "not those that the ledger noted"),
        (verdicts_left_out, "not those that the ledger noted"),
        (too_many_attempts, "attempt 4"),
        (a_spoilt_ledger, "line"),
        (charges_above_the_budget, "data owner allows"),
    ],
)
def test_a_spoilt_run_is_not_released(clinic: Path, fault: Callable[[Path], None], word: str) -> None:
    fault(clinic)
    with pytest.raises(DpsynthError, match=word):
        let_out(clinic)
    assert not (clinic / "out").exists()


@pytest.fixture
def unnoted(clinic: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wall of the ledger's digest of the training is taken away, so that the next one is tested."""
    known = RunFolder.open(clinic / "run").digest("train")
    digest = RunFolder.digest
    monkeypatch.setattr(RunFolder, "digest", lambda run, stage: known if stage == "train" else digest(run, stage))
    return clinic


def test_an_epsilon_that_was_not_booked_is_not_released(unnoted: Path) -> None:
    lower_epsilon(unnoted)
    with pytest.raises(GateRefused, match="booked other mechanisms"):
        let_out(unnoted)


def test_a_run_whose_training_was_never_closed_is_not_released(clinic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was killed before the ledger noted what came of it; the same command closes it."""
    (charge,) = Ledger.load(clinic / "ledger").charges()
    monkeypatch.setattr(Ledger, "charge", lambda *_: replace(charge, settled=False))
    with pytest.raises(LedgerError, match="never closed"):
        let_out(clinic)


def test_the_ledger_not_the_run_folder_says_whom_the_guarantee_protects(unnoted: Path) -> None:
    clinic = unnoted
    edit_json(clinic / "run" / "train" / "guarantee.json", lambda value: value.update(unit="image", data_name="another hospital"))
    seal(clinic, "train")
    released = json.loads((let_out(clinic) / "guarantee.json").read_text())
    assert (released["unit"], released["data_name"]) == ("patient", "clinic")


def test_a_ledger_of_ones_own_allows_nothing(clinic: Path) -> None:
    config = load_config(clinic / "config.yaml")
    open_ledger(config, path=clinic / "mine", epsilon=100.0, delta=None, max_gate_attempts=9, progress=silent)
    with pytest.raises(LedgerError, match="no reservation"):
        let_out(clinic, "mine")
    with pytest.raises(LedgerError, match="no reservation"):
        checks_run.check(clinic / "run", ledger_path=clinic / "mine", progress=silent)
    with pytest.raises(LedgerError, match="No ledger"):  # none beside the data: the run folder cannot name one
        release(clinic / "run", out=clinic / "out", key_path=clinic / "keys" / "signing.key", ledger_path=None, reviews={}, progress=silent)


def test_images_that_changed_after_training_are_not_checked(clinic: Path) -> None:
    Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)).save(clinic / "xrays" / "i003.png")
    with pytest.raises(LedgerError, match="other data"):
        checks_run.check(clinic / "run", ledger_path=clinic / "ledger", progress=silent)


def test_a_check_that_cannot_begin_costs_no_attempt(clinic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> None:
        raise ArtifactError("no such encoder")

    ledger = Ledger.load(clinic / "ledger")
    (charge,) = ledger.charges()
    before = ledger.gate_attempts(charge.run_id)
    monkeypatch.setattr(checks_run, "encoder_of", missing)
    with pytest.raises(ArtifactError, match="no such encoder"):
        checks_run.check(clinic / "run", ledger_path=clinic / "ledger", progress=silent)
    assert Ledger.load(clinic / "ledger").gate_attempts(charge.run_id) == before


@pytest.mark.parametrize("changed", [{"key": b"w" * 32}, {"control_fraction": 0.45}])
def test_coins_that_were_not_committed_to_before_training_are_refused(unnoted: Path, changed: dict[str, Any]) -> None:
    """Whoever owns the run folder draws the split again until the checks like it, or calls patients control who were trained on: the
    ledger knows coins and fraction of the training."""
    clinic = unnoted
    path = clinic / "run" / "train" / "site" / "split.json"
    config, own = load_config(clinic / "config.yaml"), json.loads(path.read_text())
    images = prepare(read_cohort(config.data), config.data, progress=silent)
    wanted = {"control_fraction": own["control_fraction"], "key": bytes.fromhex(own["key"]), **changed}
    write_json(path, split_patients(images, **wanted).record(), private=True)
    seal(clinic, "train")
    with pytest.raises(ArtifactError, match="coins are not those"):
        checks_run.check(clinic / "run", ledger_path=clinic / "ledger", progress=silent)


def quick(_: np.ndarray, __: np.ndarray, test: np.ndarray, *, classes: int, **___: object) -> np.ndarray:
    return np.full((len(test), classes), 1 / classes)


@pytest.fixture(scope="module")
def killed(checked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the clinic, whose second and last check was killed when it came to the classifiers."""

    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    kept, copy = tmp_path_factory.mktemp("kept") / "clinic", tmp_path_factory.mktemp("killed") / "clinic"
    shutil.copytree(checked, kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "train_arms", kill)
        with pytest.raises(KeyboardInterrupt):
            checks_run.check(checked / "run", ledger_path=checked / "ledger", progress=silent)
    shutil.move(checked, copy)
    shutil.copytree(kept, checked)
    return copy


@pytest.fixture
def interrupted(killed: Path, clinic: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.rmtree(clinic)
    shutil.copytree(killed, clinic)
    monkeypatch.setattr(arms, "train_and_predict", quick)  # the classifiers take most of the time and are not the question
    return clinic


def verdicts_of(clinic: Path) -> list[dict[str, object]]:
    """Those that do not look at the classifiers."""
    stored = json.loads((clinic / "run" / "check" / "verdicts.json").read_text())["verdicts"]
    return [verdict for verdict in stored if verdict["check"] not in ("utility", "fairness")]


def test_an_interrupted_check_goes_on_under_its_own_attempt_and_says_the_same(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*_: object, **__: object) -> None:
        raise AssertionError("this was computed before")

    first = verdicts_of(interrupted)
    monkeypatch.setattr(evidence_module, "encode", again)
    monkeypatch.setattr(search, "nearest_patients", again)
    notes: list[str] = []
    checks_run.check(interrupted / "run", ledger_path=interrupted / "ledger", progress=silent, note=notes.append)
    assert notes == ["Attempt 2 of 2, goes on from an unfinished check."]
    assert json.loads((interrupted / "run" / "check" / "verdicts.json").read_text())["attempt"] == 2
    assert verdicts_of(interrupted) == first
    assert not (interrupted / "run" / "unfinished_check").exists()
    with pytest.raises(BudgetExceeded, match="checked 2 times"):
        checks_run.check(interrupted / "run", ledger_path=interrupted / "ledger", progress=silent)


@pytest.mark.parametrize("change", ["other candidates", "no record", "another attempt since", "another version"])
def test_an_interrupted_check_of_anything_else_is_another_attempt(interrupted: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    unfinished = interrupted / "run" / "unfinished_check" / "unfinished.json"
    if change == "other candidates":
        monkeypatch.setattr(checks_run, "require_drawn", lambda *_, **__: None)
        run = RunFolder.open(interrupted / "run")
        candidates = load_candidates(run)
        save_candidates(run, replace(candidates, images=candidates.images[::-1]))
        run.complete("generate", needs=("train",), facts={"count": 100})
    elif change == "no record":
        unfinished.unlink()
    elif change == "another version":
        monkeypatch.setattr(kept, "__version__", "0.0.0")
    else:
        write_json(unfinished, {**json.loads(unfinished.read_text()), "attempt": 1})
    with pytest.raises(BudgetExceeded, match="checked 2 times"):
        checks_run.check(interrupted / "run", ledger_path=interrupted / "ledger", progress=silent)


def test_a_damaged_part_of_an_interrupted_check_is_computed_again(interrupted: Path) -> None:
    folder = interrupted / "run" / "unfinished_check"
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}  # it is about patients
    (folder / "features of control images.npz").write_bytes(b"PK")
    first = verdicts_of(interrupted)
    checks_run.check(interrupted / "run", ledger_path=interrupted / "ledger", progress=silent)
    assert verdicts_of(interrupted) == first


def test_images_that_the_generator_did_not_draw_are_not_judged(clinic: Path) -> None:
    """They have no guarantee, whatever the checks say of them. Three of a hundred; no attempt is spent."""
    with_copies(clinic)
    before = Ledger.load(clinic / "ledger").summary()["gate_attempts"]
    with pytest.raises(ArtifactError, match="3 of 100 candidates are not what the generator draws"):
        checks_run.check(clinic / "run", ledger_path=clinic / "ledger", progress=silent)
    assert Ledger.load(clinic / "ledger").summary()["gate_attempts"] == before


def test_the_checks_are_given_what_training_and_drawing_left(clinic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not asked for is not missed: without canaries or with another pool nothing would fail."""
    seen: list[evidence_module.Evidence] = []
    keys: list[bytes] = []
    screened, loaded = checks_run.screen_candidates, checks_run.load_trained
    sgd = PoissonDpSgd(noise_multiplier=1.0, clip_norm=1.0, sampling_probability=0.1, steps=2, declared_patients=300)

    def load(*given: Any, **named: Any) -> Any:
        trained = loaded(*given, **named)
        return replace(trained, guarantee=replace(trained.guarantee, mechanisms=(*trained.guarantee.mechanisms, sgd)))

    def screen(*given: Any, sample_key: bytes, **named: Any) -> Any:
        keys.append(sample_key)
        return screened(*given, sample_key=sample_key, **named)

    def stop(evidence: evidence_module.Evidence, *_: object, **__: object) -> None:
        seen.append(evidence)
        raise KeyboardInterrupt

    monkeypatch.setattr(checks_run, "run_checks", stop)
    monkeypatch.setattr(checks_run, "screen_candidates", screen)
    monkeypatch.setattr(checks_run, "load_trained", load)
    run = RunFolder.open(clinic / "run")
    run.complete("generate", needs=("train",), facts={"count": 100, "withheld": 7})
    with pytest.raises(KeyboardInterrupt):
        checks_run.check(clinic / "run", ledger_path=clinic / "ledger", progress=silent)
    (evidence,) = seen
    known = json.loads((clinic / "run" / "train" / "site" / "split.json").read_text())
    config = load_config(clinic / "config.yaml")
    images = prepare(read_cohort(config.data), config.data, progress=silent)
    split = split_patients(images, control_fraction=known["control_fraction"], key=bytes.fromhex(known["key"]))
    assert evidence.training.patient_ids == split.training.patient_ids
    assert evidence.control.patient_ids == split.control.patient_ids
    np.testing.assert_array_equal(evidence.in_pool, split.in_pool)
    assert 0 < split.in_pool.mean() < 1, "else nobody would be trained on without a coin"
    assert evidence.uses_sgd
    assert evidence.withheld == 7
    claim = json.loads((clinic / "run" / "train" / "guarantee.json").read_text())
    assert evidence.delta == claim["accounting"]["delta"]
    assert evidence.epsilon == pytest.approx(claim["accounting"]["pld"])
    assert keys == [bytes.fromhex(known["key"])]


def test_images_that_are_exchanged_while_they_are_checked_are_not_released(clinic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(*_: object, **__: object) -> tuple[()]:
        with_copies(clinic)
        return ()

    monkeypatch.setattr(checks_run, "run_checks", meanwhile)
    with pytest.raises(ArtifactError, match="changed while they were checked"):
        checks_run.check(clinic / "run", ledger_path=clinic / "ledger", progress=silent)


def test_training_images_among_the_candidates_fail_through_the_verb_whatever_the_policy_requires(
    clinic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks_run, "require_drawn", lambda *_, **__: None)
    run, config = RunFolder.open(clinic / "run"), load_config(clinic / "config.yaml")
    images = prepare(read_cohort(config.data), config.data, progress=silent)
    training = set(json.loads((clinic / "run" / "train" / "site" / "split.json").read_text())["training"])
    rows = [row for row, patient in enumerate(images.patients) if images.patient_ids[patient] in training][:100]
    candidates = replace(load_candidates(run), images=to_8_bit(images.images[rows]), labels=images.labels[rows])
    save_candidates(run, candidates)
    run.complete("generate", needs=("train",), facts={"count": 100})
    verdicts = {v.check: v.outcome.value for v in checks_run.check(clinic / "run", ledger_path=clinic / "ledger", progress=silent)}
    assert (verdicts["copying"], verdicts["membership"]) == ("fail", "fail")
    with pytest.raises(GateRefused, match="copying: fail"):
        let_out(clinic)


def test_an_unfinished_run_says_what_to_do(clinic: Path) -> None:
    shutil.rmtree(clinic / "run" / "check")
    with pytest.raises(ArtifactError, match="dpsynth check"):
        let_out(clinic)


@pytest.mark.parametrize("accepted", ["nonsense", "accounting", "fidelity"])
def test_only_a_flag_can_be_accepted(clinic: Path, accepted: str) -> None:
    with pytest.raises(UsageError, match="only a flag"):
        release(
            clinic / "run",
            out=clinic / "out",
            key_path=clinic / "keys" / "signing.key",
            ledger_path=clinic / "ledger",
            reviews={accepted: "Dr A: fine"},
            progress=silent,
        )


def test_an_empty_folder_added_to_a_release_is_named(clinic: Path) -> None:
    out = let_out(clinic)
    (out / "images" / "new").mkdir()
    assert any("images/new" in problem for problem in verify(out, clinic / "keys" / "signing.pub"))
