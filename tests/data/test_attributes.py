"""Attributes beside the label: columns and keywords become public values, and each fault is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydicom
import pytest

from dpsynth.config import Config, DataConfig, dump_config, parse_config
from dpsynth.data.attributes import by_cell, conditions_digest
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.errors import ConfigError, DataError
from dpsynth.progress import silent

AGE = {"column": "age_years", "bands": [0, 18, 65, 120]}


def declared(config: DataConfig, attributes: dict[str, Any], **others: Any) -> DataConfig:
    values = config.model_dump(exclude={"attributes"})
    return DataConfig.model_validate({**values, **others, "attributes": attributes})


def test_bands_hold_their_lower_edge_and_the_last_both() -> None:
    config = DataConfig(attributes={"age": AGE})  # type: ignore[dict-item]
    assert config.cells.attributes == (("age", ("0-18", "18-65", "65-120")),)
    stored = {"0": "0-18", "17.9": "0-18", "18": "18-65", "64": "18-65", "65": "65-120", "120": "65-120"}
    for text, band in stored.items():
        assert value_of(text, AGE) == band
    for text in ("-1", "121", "nan", "forty", "inf"):
        with pytest.raises(DataError, match=r"P000000/0: age '.*' is not in data.attributes.age: 0-18, 18-65, 65-120"):
            value_of(text, AGE)


def value_of(stored: str, attribute: dict[str, Any]) -> str:
    from dataclasses import replace

    from dpsynth.data.attributes import with_declared_values

    config = DataConfig(attributes={"age": attribute}, phantom={"num_patients": 1, "max_images": 1})  # type: ignore[dict-item, arg-type]
    cohort = read_cohort(DataConfig(phantom={"num_patients": 1, "max_images": 1}))  # type: ignore[arg-type]
    (record,) = cohort.records
    changed = replace(cohort, records=(replace(record, attributes={"age_years": stored, "sex": "F"}),))
    (record,) = with_declared_values(changed, config).records
    return record.attributes["age"]


def test_images_without_a_value_belong_to_unknown_only_where_it_is_declared() -> None:
    assert value_of("", {**AGE, "values": ["unknown"]}) == "unknown"
    assert value_of("unknown", {**AGE, "values": ["unknown"]}) == "unknown"
    with pytest.raises(DataError, match=r"P000000/0: no value for age\. Fill it in, leave the image out, or add unknown"):
        value_of("", AGE)


@pytest.mark.parametrize("kind", ["raster", "nifti"])
def test_a_column_of_the_table_is_read_and_its_faults_are_named(kind: str, request: pytest.FixtureRequest) -> None:
    folder, config = request.getfixturevalue(kind)
    table = folder / "table.csv"
    good = table.read_text().replace("P03,lesion,F", "P03,lesion,M")
    table.write_text(good)
    config = declared(config, {"sex": ["F", "M"]})
    images = prepare(read_cohort(config), config, progress=silent)
    cells = by_cell(images, config)
    assert cells.classes == ("normal, sex F", "normal, sex M", "lesion, sex F", "lesion, sex M")
    assert cells.labels[3] == 3
    assert set(cells.labels.tolist()) == {0, 2, 3}
    assert images.labels.tolist() == [0, 1] * 12  # checks and releases go on with the label
    for spoiled, words in (
        (good.replace("P04,normal,F", "P04,normal,X"), "i04.*: sex 'X' is not in data.attributes.sex: F, M"),
        (good.replace("P04,normal,F", "P04,normal,"), "i04.*: no value for sex"),
        (good.replace(",sex", ",gender"), "data.attributes.sex: no image has a value of 'sex'; there are: gender"),
    ):
        table.write_text(spoiled)
        with pytest.raises(DataError, match=words):
            read_cohort(config)


def test_a_typing_error_in_a_column_is_no_data_set_of_unknowns(raster: tuple[Path, DataConfig]) -> None:
    config = declared(raster[1], {"sex": {"column": "seks", "values": ["F", "M", "unknown"]}})
    with pytest.raises(DataError, match="no image has a value of 'seks'; there are: sex"):
        read_cohort(config)


def test_dicom_keywords_and_columns_of_its_table(dicom: tuple[Path, DataConfig]) -> None:
    folder, config = dicom
    attributes = {"sex": ["F", "M"], "age": AGE, "view": {"column": "ViewPosition", "values": ["AP", "PA", "unknown"]}}
    for index, path in enumerate(sorted(folder.glob("*.dcm"))):
        dataset = pydicom.dcmread(path)
        dataset.PatientSex, dataset.ViewPosition = "FM"[index % 2], ["AP", "PA", ""][index % 3]
        dataset.save_as(path)
    config = declared(config, attributes)
    records = read_cohort(config).records
    assert [r.attributes["sex"] for r in records[:3]] == ["F", "M", "F"]
    assert [r.attributes["view"] for r in records[:3]] == ["AP", "PA", "unknown"]
    assert {r.attributes["age"] for r in records} == {"18-65"}
    rows = [f"i{index:02d}.dcm,normal,M" if index % 2 else f"i{index:02d}.dcm,lesion,F" for index in range(len(records))]
    rows[0] = "i00.dcm,lesion,"
    (folder / "table.csv").write_text("\n".join(["file,label,PatientSex", *rows]) + "\n")
    by_table = declared(
        config, {"sex": {"column": "PatientSex", "values": ["F", "M", "unknown"]}}, label_column="label", classes=("normal", "lesion")
    )
    assert [r.attributes["sex"] for r in read_cohort(by_table).records[:3]] == ["unknown", "M", "F"]


def test_slices_of_one_series_with_different_attributes_are_refused(dicom: tuple[Path, DataConfig]) -> None:
    folder, config = dicom
    for index, path in enumerate(sorted(folder.glob("*.dcm"))):
        dataset = pydicom.dcmread(path)
        dataset.SeriesInstanceUID, dataset.PatientID = f"2.25.{index // 2}", f"P{index // 2}"
        dataset.SeriesDescription, dataset.ViewPosition = "normal", "AP" if index != 3 else "PA"
        dataset.save_as(path)
    volumes = {"spatial_shape": (8, 12, 12), "classes": ("normal",)}
    read_cohort(declared(config, {}, **volumes))
    with pytest.raises(DataError, match=r"i03\.dcm: another patient or label, or other attributes, than i02\.dcm"):
        read_cohort(declared(config, {"view": {"column": "ViewPosition", "values": ["AP", "PA"]}}, **volumes))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: {attributes: {sex: [F]}}", "data.attributes.sex: an attribute needs at least two values"),
        ("data: {attributes: {sex: [F, F]}}", "data.attributes.sex: an attribute needs at least two values or bands, none of them twice"),
        ("data: {attributes: {sex: F}}", "data.attributes.sex"),
        ("data: {attributes: {smoker: [yes, no]}}", "data.attributes.smoker.values.0: Input should be a valid string"),
        ("data: {attributes: {age: {bands: [0, 18, 18]}}}", "bands must be two or more rising numbers"),
        ("data: {attributes: {age: {bands: [0, .inf]}}}", "data.attributes.age.bands.1"),
        ("data: {attributes: {age: {bands: [0, 18, 99], unit: years}}}", "data.attributes.age.unit: unknown setting"),
        ("data: {attributes: {label: [F, M]}}", "an attribute cannot be called label"),
        ("data: {attributes: {'a b': [F, M]}}", "data.attributes.a b"),
        ("data: {attributes: {a: [b, c, d, e, f, g], h: [i, j, k, l, m, n]}}", "make 72 cells, at most 64"),
        ("data: {format: medmnist, path: x.npz, unit: image, attributes: {sex: [F, M]}}", "MedMNIST file holds no attributes"),
        ("generate: {target: {sex: {F: 1}}}", "generate.target.sex: unknown attribute, expected one of label"),
        ("generate: {target: {label: {normal: 1, lesion: 0}}}", "generate.target.label.lesion: expected a share above 0"),
    ],
)
def test_a_wrong_list_or_target_is_one_line(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, base=Path("/"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_with_attributes_survives_writing_and_reading() -> None:
    text = "data: {attributes: {sex: [F, M], age: {column: age_years, bands: [0, 18, 65], values: [unknown]}}}\n"
    config = parse_config(text + "generate: {target: {sex: {F: 0.5, M: 0.5}}}\n", base=Path("/"))
    assert parse_config(dump_config(config), base=Path("/")) == config
    assert config.data.cells.shape == (2, 2, 3)
    assert Config().data.cells.shape == (2,)


def test_the_digest_of_conditions_sees_one_changed_attribute_and_needs_the_salt(raster: tuple[Path, DataConfig]) -> None:
    folder, config = raster
    config = declared(config, {"sex": ["F", "M"]})
    table = folder / "table.csv"
    table.write_text(table.read_text().replace("P03,lesion,F", "P03,lesion,M"))

    def digest(salt: bytes) -> str:
        return conditions_digest(by_cell(prepare(read_cohort(config), config, progress=silent), config), config, salt=salt)

    first = digest(b"salt")
    assert digest(b"salt") == first
    assert digest(b"pepper") != first
    table.write_text(table.read_text().replace("P05,lesion,F", "P05,lesion,M"))
    assert digest(b"salt") != first
    assert conditions_digest(prepare(read_cohort(raster[1]), raster[1], progress=silent), raster[1], salt=b"salt") == ""
