"""The audit finds each planted fault by its kind, alarms on nothing else, and what the owner then leaves out becomes part of the data."""

from __future__ import annotations

import csv
import json
import re
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import ImageDraw, ImageEnhance, ImageFont

from dpsynth.audit.doubles import SIMILAR, similar_pairs
from dpsynth.audit.finding import Kind
from dpsynth.audit.labels import suspicious
from dpsynth.audit.run import Audit, audit
from dpsynth.audit.subgroups import groups
from dpsynth.config import Config, load_config, parse_config
from dpsynth.data.fingerprint import fingerprint, open_ledger, require_data
from dpsynth.data.phantom import phantom_cohort
from dpsynth.data.source import read_cohort
from dpsynth.errors import ArtifactError, ConfigError, DataError, LedgerError
from dpsynth.model.thumbnails import thumbnails
from dpsynth.privacy.ledger import Ledger
from dpsynth.progress import silent

CLASSES = ("normal", "lesion")
PATIENTS, SIDE = 160, 64
CONFIG = """\
method: moments
data:
  {format: raster, path: xrays, name: clinic, classes: [normal, lesion], declared_patients: 160, spatial_shape: [28, 28],
   attributes: {sex: [F, M]}, permission_column: consent}
"""


def write_clinic(folder: Path, *, faults: bool) -> dict[str, set[str]]:
    """A folder of X-rays with a table; by kind the names of the images that carry a planted fault."""
    (folder / "xrays").mkdir(parents=True)
    cohort = phantom_cohort(
        anatomy="chest", num_patients=PATIENTS, max_images=2, spatial_shape=(SIDE, SIDE), channels=1, classes=CLASSES, seed=3, name="x"
    )
    rows, pictures = [], []
    for record in cohort.records:
        name = record.name.replace("/", "-") + ".png"
        rows.append([name, record.patient_id, CLASSES[record.label], record.attributes["sex"], "yes"])
        pictures.append(Pillow.fromarray(record.read().voxels[0].astype(np.uint8)))
    planted: dict[str, set[str]] = {kind.name: set() for kind in Kind}
    if faults:
        _plant(rows, pictures, planted)
    for row, picture in zip(rows, pictures, strict=True):
        picture.save(folder / "xrays" / row[0])
    with (folder / "xrays" / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "patient_id", "label", "sex", "consent"], *rows])
    (folder / "config.yaml").write_text(CONFIG)
    return planted


def _plant(rows: list[list[str]], pictures: list[Pillow.Image], planted: dict[str, set[str]]) -> None:
    own = {row[1]: [index for index, other in enumerate(rows) if other[1] == row[1]] for row in rows}
    pairs = [indices for indices in own.values() if len(indices) == 2]
    for copied, owner in zip(pairs[0], ("again-0.png", "again-1.png"), strict=True):  # the same person, registered again
        rows.append([owner, "P900001", rows[copied][2], rows[copied][3], "yes"])
        pictures.append(ImageEnhance.Brightness(pictures[copied]).enhance(0.9))
        planted["PERSON"].add(owner)
    rows.append(["double.png", "P900002", rows[pairs[1][0]][2], "F", "yes"])
    pictures.append(pictures[pairs[1][0]].transpose(Pillow.Transpose.FLIP_LEFT_RIGHT))
    planted["DOUBLE"].add("double.png")
    named = pairs[2][0]
    ImageDraw.Draw(pictures[named]).text((3, 3), "DOE JOHN", fill=255, font=ImageFont.load_default(size=10))
    planted["TEXT"].add(rows[named][0])
    rows[pairs[3][0]][4], rows[pairs[4][1]][4] = "no", ""
    planted["PERMISSION"] |= {rows[pairs[3][0]][0], rows[pairs[4][1]][0]}
    pictures[pairs[5][0]] = Pillow.new("L", (SIDE, SIDE), 77)
    pictures[pairs[6][0]] = Pillow.new("L", (SIDE, SIDE), 255)
    planted["UNUSABLE"] |= {rows[pairs[5][0]][0], rows[pairs[6][0]][0]}


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, set[str]], Audit]:
    folder = tmp_path_factory.mktemp("clinic")
    planted = write_clinic(folder, faults=True)
    return folder, planted, audit(load_config(folder / "config.yaml"), out=folder / "audit", progress=silent)


def proposed(result: Audit, kind: Kind) -> set[str]:
    return {name for finding in result.findings if finding.kind is kind for name in finding.proposed}


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.LABEL])
def test_every_planted_fault_is_found_by_its_kind_and_nothing_else(kind: Kind, clinic: tuple[Path, dict[str, set[str]], Audit]) -> None:
    _, planted, result = clinic
    assert proposed(result, kind) == planted[kind.name]


def test_a_clean_cohort_raises_no_alarm(tmp_path: Path) -> None:
    write_clinic(tmp_path, faults=False)
    result = audit(load_config(tmp_path / "config.yaml"), out=tmp_path / "audit", progress=silent)
    assert [finding for finding in result.findings if finding.kind is not Kind.LABEL] == []
    assert len(proposed(result, Kind.LABEL)) <= 0.03 * result.images


def test_different_people_stay_below_the_limit_of_doubles() -> None:
    cohort = phantom_cohort(
        anatomy="chest", num_patients=800, max_images=1, spatial_shape=(28, 28), channels=1, classes=CLASSES, seed=4, name="x"
    )
    images = np.stack([record.read().voxels for record in cohort.records]).astype(np.float32) / 127.5 - 1
    rows = thumbnails(images)
    assert (rows @ rows.T - 2 * np.eye(800)).max() < SIMILAR
    noisy = np.concatenate([images, images[:50] + np.random.default_rng(0).normal(0, 0.03, images[:50].shape).astype(np.float32)])
    pairs = similar_pairs(noisy, np.arange(850), progress=silent)
    assert {(first, second) for first, second, _ in pairs} == {(row, 800 + row) for row in range(50)}
    assert similar_pairs(noisy, np.arange(850) % 800, progress=silent) == [], "images of one patient are no fault"


def test_confident_learning_by_hand() -> None:
    """Two classes believed at 0.8 by their own members; only the row that is believed at 0.05 and firmly the other is suspicious."""
    labels = np.array([0, 0, 0, 1, 1, 1])
    zero = np.array([0.85, 0.85, 0.05, 0.2, 0.2, 0.2])
    probabilities = np.stack([zero, 1 - zero], axis=1)
    assert suspicious(probabilities, labels).tolist() == [False, False, True, False, False, False]
    assert not suspicious(np.full((6, 2), 0.5), labels).any(), "a classifier that knows nothing accuses nobody"


def test_swapped_labels_are_named_and_right_ones_mostly_left_alone(tmp_path: Path) -> None:
    """Bright against dark images: no right label is doubted, and most of the 8 swapped ones are, as their share of a class is large."""
    rng = np.random.default_rng(0)
    (tmp_path / "xrays").mkdir()
    lines, swapped = ["file,patient_id,label,sex,consent"], {f"i{index:03d}.png" for index in range(0, 160, 20)}
    for index in range(160):
        label, name = index % 2, f"i{index:03d}.png"
        pixels = np.clip(rng.normal(80 + 70 * label, 20, (28, 28)), 0, 255).astype(np.uint8)
        Pillow.fromarray(pixels).save(tmp_path / "xrays" / name)
        stated = 1 - label if name in swapped else label
        lines.append(f"{name},p{index},{CLASSES[stated]},F,yes")
    (tmp_path / "xrays" / "table.csv").write_text("\n".join(lines))
    (tmp_path / "config.yaml").write_text(CONFIG)
    result = audit(load_config(tmp_path / "config.yaml"), out=tmp_path / "audit", progress=silent)
    assert proposed(result, Kind.LABEL) <= swapped
    assert len(proposed(result, Kind.LABEL)) >= 5
    assert result.label_accuracy > 0.9


def test_small_subgroups_are_counted_by_patient(clinic: tuple[Path, dict[str, set[str]], Audit]) -> None:
    folder, _, result = clinic
    config = load_config(folder / "config.yaml").data.model_copy(update={"permission_column": None})
    records = read_cohort(config).records
    for group in groups(records, CLASSES, ("sex",)):
        label, _, sex = group.name.partition(", sex ")
        members = [r for r in records if CLASSES[r.label] == label and (not sex or r.attributes["sex"] == sex)]
        assert (group.patients, group.images) == (len({r.patient_id for r in members}), len(members))
        assert group.small == (group.patients < 50)
    assert any(group.small for group in result.groups)


def test_the_page_shows_everything_runs_nothing_and_is_for_its_owner_alone(clinic: tuple[Path, dict[str, set[str]], Audit]) -> None:
    folder, planted, result = clinic
    for name in ("audit.html", "audit.json", "exclusions.csv"):
        assert stat.S_IMODE((folder / "audit" / name).stat().st_mode) == 0o600
    page = (folder / "audit" / "audit.html").read_text()
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert "must not leave" in page
    for names in planted.values():
        assert all(name in page for name in names)
    record = json.loads((folder / "audit" / "audit.json").read_text())
    assert len(record["findings"]) == len(result.findings)
    with pytest.raises(ArtifactError, match="not to exist"):
        audit(load_config(folder / "config.yaml"), out=folder / "audit", progress=silent)


def with_exclusions(folder: Path, text: str | None = None) -> Config:
    """The clinic's configuration with the list that the audit proposed, or another."""
    path = folder / "chosen.csv"
    path.write_text((folder / "audit" / "exclusions.csv").read_text() if text is None else text)
    config = load_config(folder / "config.yaml")
    return config.model_copy(update={"data": config.data.model_copy(update={"exclusions": path})})


def test_what_is_excluded_is_out_before_anything_is_decoded(clinic: tuple[Path, dict[str, set[str]], Audit]) -> None:
    folder, planted, _ = clinic
    kept = {record.name for record in read_cohort(with_exclusions(folder).data).records}
    assert kept.isdisjoint(set().union(*planted.values()))
    every = [name for name in (folder / "xrays").iterdir() if name.suffix == ".png"]
    with (folder / "audit" / "exclusions.csv").open() as file:
        assert len(every) - len(kept) == sum(1 for _ in file) - 1


def test_an_audit_after_exclusions_says_what_was_left_out_and_why(clinic: tuple[Path, dict[str, set[str]], Audit]) -> None:
    folder, planted, first = clinic
    one, other = sorted(planted["PERMISSION"])[:2]
    text = f"image,reason\n{one},no consent\n{other},no consent\n"
    again = audit(with_exclusions(folder, text), out=folder / "again", progress=silent)
    assert again.left_out == {"no consent": 2}
    assert not first.left_out
    assert "2 images were left out before" in again.lines()
    assert json.loads((folder / "again" / "audit.json").read_text())["left_out"] == {"no consent": 2}
    assert "<td>no consent</td><td>2</td>" in (folder / "again" / "audit.html").read_text()


def test_a_second_id_is_named_by_both_ids(clinic: tuple[Path, dict[str, set[str]], Audit]) -> None:
    """Or the owner could not merge them in the table, which protects the person as one."""
    findings = [finding for finding in clinic[2].findings if finding.kind is Kind.PERSON]
    assert findings
    for finding in findings:
        assert len(re.findall(r"of patient \S+", finding.detail)) == 2
        assert "give both one id in the table" in finding.detail


def test_images_without_permission_are_refused_until_they_are_excluded(clinic: tuple[Path, dict[str, set[str]], Audit]) -> None:
    folder, planted, _ = clinic
    with pytest.raises(DataError, match=r"2 images have no permission in 'consent'"):
        read_cohort(load_config(folder / "config.yaml").data)
    one = sorted(planted["PERMISSION"])[0]
    with pytest.raises(DataError, match=r"1 images have no permission"):
        read_cohort(with_exclusions(folder, f"image,reason\n{one},no consent\n").data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,why\na.png,x\n", "columns image and reason"),
        ("image,reason\nno-such.png,double\n", "have no image"),
        ("image,reason\ndouble.png,\n", "line 2"),
        ("image,reason\ndouble.png,a\ndouble.png,b\n", "twice"),
    ],
)
def test_a_wrong_list_is_named(text: str, message: str, clinic: tuple[Path, dict[str, set[str]], Audit]) -> None:
    with pytest.raises(DataError, match=message):
        read_cohort(with_exclusions(clinic[0], text).data)


def test_a_list_changed_after_the_ledger_was_opened_is_other_data(clinic: tuple[Path, dict[str, set[str]], Audit]) -> None:
    """Attack: an image is let in again, or only its reason is changed, behind the ledger's back."""
    folder, _, _ = clinic
    config = with_exclusions(folder)
    open_ledger(config, path=folder / "ledger", epsilon=5.0, delta=None, max_gate_attempts=2, progress=silent)
    ledger = Ledger.load(folder / "ledger")
    require_data(read_cohort(config.data), config.data, ledger, progress=silent)
    lines = (folder / "chosen.csv").read_text().splitlines()
    for changed in ([line for line in lines if not line.startswith("double.png")], [*lines[:-1], lines[-1] + " indeed"]):
        other = with_exclusions(folder, "\n".join(changed) + "\n")
        with pytest.raises(LedgerError):
            require_data(read_cohort(other.data), other.data, ledger, progress=silent)


def test_without_a_list_the_fingerprint_is_what_it_was(clinic: tuple[Path, dict[str, set[str]], Audit]) -> None:
    config = with_exclusions(clinic[0])
    cohort = read_cohort(config.data)
    digests = {
        fingerprint(cohort, data, salt=b"s" * 16, progress=silent)
        for data in (config.data, config.data.model_copy(update={"exclusions": None}))
    }
    assert len(digests) == 2
    assert cohort == replace(cohort)


@pytest.mark.parametrize("kind", ["phantom", "medmnist, path: x, unit: image"])
def test_a_format_that_knows_no_permission_refuses_the_setting(kind: str) -> None:
    with pytest.raises(ConfigError, match="permission"):
        parse_config(f"data: {{format: {kind}, permission_column: consent}}", base=Path())


def small_clinic(folder: Path, data: str, *, side: int = 28) -> Config:
    """Thirty X-rays of as many patients, two of them without what was declared, one with a label that nobody declared and one without."""
    (folder / "xrays").mkdir()
    rng = np.random.default_rng(0)
    lines = ["file,patient_id,label,sex,consent"]
    for index in range(30):
        Pillow.fromarray(rng.integers(0, 200, (side, side), dtype=np.uint8)).save(folder / "xrays" / f"i{index:02d}.png")
        label = {4: "lesoin", 7: ""}.get(index, CLASSES[index % 2])
        lines.append(f"i{index:02d}.png,p{index},{label},{ {3: '', 9: 'female'}.get(index, 'FM'[index % 2]) },yes")
    (folder / "xrays" / "table.csv").write_text("\n".join(lines) + "\n")
    text = (
        f"method: moments\ndata: {{format: raster, path: xrays, name: clinic, classes: [normal, lesion], declared_patients: 30, {data}}}\n"
    )
    (folder / "config.yaml").write_text(text)
    return load_config(folder / "config.yaml")


def test_what_was_not_looked_for_is_not_called_clean(tmp_path: Path) -> None:
    """At 28 pixels no text can be read, nobody declared a column of permissions or an attribute, nobody has two images."""
    result = audit(small_clinic(tmp_path, ""), out=tmp_path / "audit", progress=silent)
    unseen = {Kind.TEXT: "48 pixels", Kind.PERMISSION: "permission_column", Kind.VALUE: "data.attributes", Kind.PERSON: "two images"}
    page, record = (tmp_path / "audit" / "audit.html").read_text(), json.loads((tmp_path / "audit" / "audit.json").read_text())
    for kind, reason in unseen.items():
        assert reason in result.not_looked_for[kind]
        (line,) = [line for line in result.lines() if kind.value in line]
        assert line.split()[0] == "-"
        assert f"not looked for, since {result.not_looked_for[kind]}" in line
        assert f'<td>{kind.value}</td><td colspan="2">not looked for: ' in page
        assert kind.name.lower() in record["not_looked_for"]
    assert Kind.UNUSABLE not in result.not_looked_for
    assert "Text was looked for" not in page


def test_in_larger_images_text_is_looked_for_and_counted(tmp_path: Path) -> None:
    config = small_clinic(tmp_path, "permission_column: consent, attributes: {sex: [F, M]}", side=48)
    result = audit(config, out=tmp_path / "audit", progress=silent)
    assert set(result.not_looked_for) == {Kind.PERSON}
    assert "in the 30 images that are stored large enough" in (tmp_path / "audit" / "audit.html").read_text()


def test_labels_and_values_that_nobody_declared_are_findings_and_belong_to_no_group(tmp_path: Path) -> None:
    config = small_clinic(tmp_path, "attributes: {sex: [F, M]}")
    result = audit(config, out=tmp_path / "audit", progress=silent)
    assert proposed(result, Kind.CLASS) == {"i04.png", "i07.png"}
    assert proposed(result, Kind.VALUE) == {"i03.png", "i09.png"}
    details = " ".join(finding.detail for finding in result.findings)
    assert all(word in details for word in ("'lesoin'", "label is empty in 'label'", "'female'", "no value for sex"))
    assert {group.name for group in result.groups} == {*CLASSES, *(f"{label}, sex {sex}" for label in CLASSES for sex in "FM")}
    assert sum(group.images for group in result.groups if ", sex" in group.name) == 26
    with pytest.raises(DataError, match="lesoin"):
        read_cohort(config.data)
    kept = with_exclusions(tmp_path)
    assert len(read_cohort(kept.data).records) == 26


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("permission_column: consnt", r"data\.permission_column: no image has a value of 'consnt'; there are: consent, sex"),
        ("attributes: {sxe: [F, M]}", r"data\.attributes\.sxe: no image has a value of 'sxe'; there are: consent, sex"),
        ("label_column: consent", r"No image has a label of data\.classes \['normal', 'lesion'\]; there are: 'yes'"),
    ],
)
def test_a_misspelt_column_is_an_error_and_accuses_nobody(setting: str, words: str, tmp_path: Path) -> None:
    config = small_clinic(tmp_path, setting)
    with pytest.raises(DataError, match=words):
        audit(config, out=tmp_path / "audit", progress=silent)
    with pytest.raises(DataError):
        read_cohort(config.data)
    assert not (tmp_path / "audit").exists()


def test_a_misspelt_column_of_permissions_stops_what_reads_the_data(tmp_path: Path) -> None:
    config = small_clinic(tmp_path, "permission_column: consnt")
    table = tmp_path / "xrays" / "table.csv"
    table.write_text(table.read_text().replace("lesoin", "lesion").replace("p7,,", "p7,lesion,"))
    with pytest.raises(DataError, match="'consnt'; there are: consent, sex"):
        read_cohort(config.data)
