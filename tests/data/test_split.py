"""The split is by patient, by a keyed coin that looks at nothing but the patient."""

from __future__ import annotations

import hashlib
import hmac
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dpsynth.data.split as split_module
from dpsynth.data.cohort import ImageSet
from dpsynth.data.split import restore_split, split_patients, split_problems
from dpsynth.errors import DataError

KEY = bytes(range(32))


def images_of(patient_ids: tuple[str, ...], counts: list[int]) -> ImageSet:
    patients = np.repeat(np.arange(len(patient_ids), dtype=np.int64), counts)
    return ImageSet(
        images=np.arange(len(patients), dtype=np.float32)[:, None, None, None] * np.ones((1, 4, 4), dtype=np.float32),
        labels=patients % 2,
        patients=patients,
        patient_ids=patient_ids,
        classes=("a", "b"),
        attributes=tuple({"patient": patient_ids[patient]} for patient in patients),
    )


def ids(count: int) -> tuple[str, ...]:
    return tuple(f"P{number}" for number in range(count))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.integers(1, 5), min_size=30, max_size=60), st.binary(min_size=32, max_size=32))
def test_no_patient_is_ever_on_both_sides_and_no_image_is_lost(counts: list[int], key: bytes) -> None:
    images = images_of(ids(len(counts)), counts)
    split = split_patients(images, control_fraction=0.5, key=key)
    training, control = split.training, split.control
    assert set(training.patient_ids) | set(control.patient_ids) == set(images.patient_ids)
    assert not set(training.patient_ids) & set(control.patient_ids)
    assert len(training.images) + len(control.images) == len(images.images)
    for side in (training, control):
        for row, patient in enumerate(side.patients):
            name = side.patient_ids[patient]
            assert side.attributes[row]["patient"] == name
            assert images.patients[int(side.images[row].flat[0])] == images.patient_ids.index(name)
            assert side.labels[row] == images.patient_ids.index(name) % 2


def test_the_side_of_a_patient_depends_on_nobody_else_nor_on_the_order() -> None:
    everyone = split_patients(images_of(ids(200), [1] * 200), control_fraction=0.3, key=KEY)
    some = tuple(reversed(ids(200)[50:120]))
    fewer = split_patients(images_of(some, [2] * 70), control_fraction=0.3, key=KEY)
    assert set(fewer.control.patient_ids) == set(everyone.control.patient_ids) & set(some)


def test_a_larger_fraction_only_adds_patients_to_control() -> None:
    images = images_of(ids(200), [1] * 200)
    small = split_patients(images, control_fraction=0.2, key=KEY).control.patient_ids
    large = split_patients(images, control_fraction=0.6, key=KEY).control.patient_ids
    assert set(small) < set(large)


def test_the_coin_has_the_stated_bias_and_is_hmac_sha256() -> None:
    images = images_of(ids(4000), [1] * 4000)
    control = set(split_patients(images, control_fraction=0.25, key=KEY).control.patient_ids)
    assert abs(len(control) / 4000 - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 4000)
    for name in ids(50):
        digest = hmac.new(KEY, b"split\0" + name.encode(), hashlib.sha256).digest()
        assert (name in control) == (int.from_bytes(digest, "big") / 2**256 < 0.25)


def test_another_key_gives_another_split() -> None:
    images = images_of(ids(100), [1] * 100)
    one = split_patients(images, control_fraction=0.5, key=KEY).control.patient_ids
    assert one != split_patients(images, control_fraction=0.5, key=KEY[::-1]).control.patient_ids


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_an_empty_side_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match="control_fraction"):
        split_patients(images_of(ids(30), [1] * 30), control_fraction=fraction, key=KEY)


def test_the_record_restores_the_split_and_commits_to_key_and_fraction() -> None:
    images = images_of(ids(60), [1, 2] * 30)
    split = split_patients(images, control_fraction=0.4, key=KEY)
    record = json.loads(json.dumps(split.record()))
    assert record["commitment"] == hashlib.sha256(KEY + b"\x000.4").hexdigest()
    for fraction, key in ((0.3, KEY), (0.4, KEY[::-1])):
        assert split_patients(images, control_fraction=fraction, key=key).commitment != record["commitment"]
    again = restore_split(images, record)
    assert again.control.patient_ids == split.control.patient_ids
    assert np.array_equal(again.training.images, split.training.images)
    assert split_problems(again) == ()


@pytest.mark.parametrize("side", ["training", "control"])
def test_a_record_of_other_patients_is_refused(side: str) -> None:
    record = split_patients(images_of(ids(60), [1] * 60), control_fraction=0.4, key=KEY).record()
    left = tuple(name for name in ids(60) if name != record[side][0])
    with pytest.raises(DataError, match="not those"):
        restore_split(images_of(left, [1] * 59), record)


def test_the_pool_is_chosen_and_its_coins_fall_as_stated_whoever_else_takes_part() -> None:
    """Of 4,000 patients at f = 0.1: a fifth in the pool, half of them trained on, and nobody's place moves when others leave."""
    everyone = split_patients(images_of(ids(4000), [1] * 4000), control_fraction=0.1, key=KEY)
    inside = {name for name, chosen in zip(everyone.training.patient_ids, everyone.in_pool, strict=True) if chosen}
    outside = set(everyone.control.patient_ids)
    assert abs(len(inside | outside) / 4000 - 0.2) < 5 * np.sqrt(0.16 / 4000)
    assert abs(len(inside) / len(inside | outside) - 0.5) < 5 * 0.5 / np.sqrt(800)
    some = ids(4000)[1000:1400]
    fewer = split_patients(images_of(some, [1] * 400), control_fraction=0.1, key=KEY)
    left = {name for name, chosen in zip(fewer.training.patient_ids, fewer.in_pool, strict=True) if chosen}
    assert left == inside & set(some)


def test_the_pool_ends_at_twice_the_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    coins = {"a": 0.19, "b": 0.21, "c": 0.39, "d": 0.41}
    monkeypatch.setattr(split_module, "_coin", lambda _, patient: coins[patient])
    images = ImageSet(
        images=np.zeros((4, 1, 4, 4), np.float32), labels=np.zeros(4, np.int64), patients=np.arange(4), patient_ids=tuple(coins),
        classes=("x",), attributes=({},) * 4,
    )  # fmt: skip
    split = split_patients(images, control_fraction=0.2, key=b"k" * 32)
    assert split.control.patient_ids == ("a",)
    assert dict(zip(split.training.patient_ids, split.in_pool.tolist(), strict=True)) == {"b": True, "c": True, "d": False}


def test_coins_that_are_not_fair_make_no_pool() -> None:
    everyone = split_patients(images_of(ids(60), [1] * 60), control_fraction=0.5, key=KEY)
    assert everyone.in_pool.all()
    with pytest.raises(ValueError, match="fair coins"):
        _ = split_patients(images_of(ids(60), [1] * 60), control_fraction=0.6, key=KEY).in_pool
