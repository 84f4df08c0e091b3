"""What a coordinator may try against a hospital: each try is refused with its code, costs nothing, and no patient is read for it."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_cases import World, told_body

import federated.site as module
from dpsynth.data.split import split_patients
from dpsynth.model.noised_sums import NoisedSums
from dpsynth.privacy.noise import NoiseStream
from dpsynth.signing import generate_key, load_private, sign_statement
from dpsynth.train.monitor import MomentMonitor
from federated.messages import Code, decode_reply
from federated.rounds import MOMENTS, NET, moments_round


@pytest.fixture
def untouched(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A guard that fails the test when it reads patients or charges anything."""
    monkeypatch.setattr(module, "private_images", lambda *_: pytest.fail("patients were read"))
    monkeypatch.setattr(module.Ledger, "reserve", lambda *_, **__: pytest.fail("something was charged"))
    return world


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"noise_multiplier": 0.49}, Code.NOISE),
        ({"moments_noise_multiplier": 0.1}, Code.NOISE),
        ({"clip_norm": 1.5}, Code.CLIP),
        ({"clip_norm": 1e-35}, Code.MALFORMED),
        ({"steps_per_round": 5}, Code.STEPS),
        ({"rounds": 11}, Code.STEPS),
        ({"rounds": 501, "steps_per_round": 1}, Code.STEPS),
        ({"sampling_probability": 0.5}, Code.SAMPLING),
        ({"sampling_probability": 1e-6}, Code.SAMPLING),
        ({"net_channels": (64, 64)}, Code.MODEL),
        ({"draws": 50}, Code.MODEL),
        ({"learning_rate": 10.0}, Code.MODEL),
        ({"low_frequencies": 13}, Code.MODEL),
        ({"num_phantoms": 20_000}, Code.MODEL),
        ({"classes": ("normal", "HIV")}, Code.LAYOUT),
        ({"attributes": (("sex", ("F", "M")),)}, Code.LAYOUT),
        ({"spatial_shape": (16, 16)}, Code.LAYOUT),
        ({"channels": 3}, Code.LAYOUT),
    ],
)
@pytest.mark.parametrize(("kind", "number"), [("join", 0), ("moments", 0), ("train", 4)])
def test_a_plan_beyond_the_policy_is_refused(untouched: World, kind: str, number: int, changes: dict[str, Any], code: Code) -> None:
    assert untouched.ask(kind, number, plan=untouched.changed(**changes)).code is code


def test_a_study_that_trains_nothing_has_the_same_floor_for_the_noise_of_its_moments(untouched: World) -> None:
    nothing = {"rounds": 0, "trainable": "none", "noise_multiplier": None}
    assert untouched.ask("join", plan=untouched.changed(**nothing)).code is None
    assert untouched.ask("moments", plan=untouched.changed(**nothing, moments_noise_multiplier=0.1)).code is Code.NOISE


def test_an_app_that_the_site_has_not_approved_is_refused(untouched: World) -> None:
    untouched.sites["a"].write_policy(apps=["0" * 64])
    untouched.sites["a"].restart()
    assert untouched.ask().code is Code.APP
    assert untouched.ask("join", plan=untouched.changed(app_sha256="1" * 64)).code is Code.APP


def test_a_message_for_another_site_is_refused(untouched: World) -> None:
    assert untouched.ask(site="b").code is Code.RECIPIENT


def test_whoever_has_no_approved_key_is_refused(untouched: World, tmp_path: Path) -> None:
    private, _ = generate_key(tmp_path / "stranger")
    assert untouched.ask(private=load_private(private)).code is Code.COORDINATOR


def all_moments(world: World, **changes: Any) -> list[Code | None]:
    """What becomes of each query of the moments."""
    return [world.ask("moments", number, **changes).code for number in range(4)]


def test_two_coordinators_cannot_share_a_study_and_share_one_budget(world: World, tmp_path: Path) -> None:
    private, public = generate_key(tmp_path / "second")
    second = load_private(private)
    world.sites["a"].write_policy(coordinators=["coordinator/signing.pub", str(public)], study_epsilon=12.0)
    world.sites["a"].restart()
    assert all_moments(world) == [None] * 4
    assert world.ask("train", 4, private=second).code is Code.STUDY_TAKEN
    assert all_moments(world, private=second, study="other") == [Code.BUDGET] * 4
    assert world.ask("train", 4).outcome == "ok"


def test_a_second_study_over_the_budget_is_refused_and_the_first_goes_on(world: World) -> None:
    assert all_moments(world) == [None] * 4
    assert all_moments(world, study="second") == [Code.BUDGET] * 4
    assert world.ask("train", 4).outcome == "ok"
    world.sites["a"].write_policy(study_epsilon=1.0)
    world.sites["a"].restart()
    assert world.ask(study="third").code is Code.STUDY_BUDGET
    assert len(world.sites["a"].guard.ledger.charges()) == 5


def test_a_plan_cannot_change_once_a_round_was_charged(world: World) -> None:
    assert world.ask("join", plan=world.changed(draws=2)).outcome == "ok"
    assert world.ask().outcome == "ok"
    assert world.ask("train", 4, plan=world.changed(noise_multiplier=world.plan.noise_multiplier * 0.99)).code is Code.PLAN_CHANGED
    assert world.ask("train", 4, plan=world.changed(draws=2)).code is Code.PLAN_CHANGED


def test_an_id_is_good_for_one_message(world: World) -> None:
    assert world.ask().outcome == "ok"
    assert world.ask("train", 4, message_id="moments-0").code is Code.MESSAGE_REUSED
    assert len(world.sites["a"].guard.ledger.charges()) == 1


def test_studies_that_were_charged_are_counted_and_refused_ones_take_no_place(world: World) -> None:
    """Else whoever is refused often enough keeps all others out."""
    cheap = world.changed(rounds=0, trainable="none", noise_multiplier=None, moments_noise_multiplier=20.0)
    world.sites["a"].write_policy(studies=2)
    world.sites["a"].restart()
    refused = world.changed(moments_noise_multiplier=0.1)
    assert [world.ask("join", study=f"refused-{number}", plan=refused).code for number in range(4)] == [Code.NOISE] * 4
    assert world.ask(study="refused-1", plan=refused).code is Code.NOISE
    assert [world.ask(study=f"study-{number}", plan=cheap).code for number in range(3)] == [None, None, Code.STUDIES]
    assert world.ask("moments", 1, study="study-0", plan=cheap).outcome == "ok"


def test_refused_studies_do_not_fill_the_disk(untouched: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("federated.journal._LARGEST_NUMBER_OF_REFUSED_STUDIES", 1)
    untouched.sites["a"].write_policy(studies=2)
    untouched.sites["a"].restart()
    refused = untouched.changed(moments_noise_multiplier=0.1)
    codes = [untouched.ask("join", study=f"refused-{number}", plan=refused).code for number in range(4)]
    assert codes == [Code.NOISE] * 4
    assert untouched.sites["a"].guard.journal.studies() == ["refused-3"]
    assert untouched.ask("join", study="honest").outcome == "ok", "nobody is kept out by what others were refused"


def test_studies_that_joined_while_there_was_room_are_counted_when_they_are_to_be_charged(world: World) -> None:
    cheap = world.changed(rounds=0, trainable="none", noise_multiplier=None, moments_noise_multiplier=40.0)
    world.sites["a"].write_policy(studies=2)
    world.sites["a"].restart()
    assert [world.ask("join", study=f"study-{number}", plan=cheap).code for number in range(4)] == [None] * 4
    assert [world.ask(study=f"study-{number}", plan=cheap).code for number in range(4)] == [None, None, Code.STUDIES, Code.STUDIES]
    assert {charge.run_id.split("/")[0] for charge in world.sites["a"].guard.ledger.charges()} == {"study-0", "study-1"}


def test_a_name_that_another_coordinator_has_taken_is_taken_before_anything_is_charged(world: World, tmp_path: Path) -> None:
    private, public = generate_key(tmp_path / "second")
    world.sites["a"].write_policy(coordinators=["coordinator/signing.pub", str(public)])
    world.sites["a"].restart()
    assert world.ask("join").outcome == "ok"
    assert world.ask("join", private=load_private(private)).code is Code.STUDY_TAKEN


def spoiled(world: World, name: str, value: float) -> dict[str, np.ndarray]:
    array = world.bodies["train"][name].copy()
    array.flat[0] = value
    return {**world.bodies["train"], name: array}


WEIGHT = NET + "out.0.weight"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda world: spoiled(world, WEIGHT, np.nan),
        lambda world: spoiled(world, WEIGHT, np.inf),
        lambda world: spoiled(world, WEIGHT, 1e30),
        lambda world: spoiled(world, MOMENTS + "covariance", np.nan),
        lambda world: {name: array for name, array in world.bodies["train"].items() if name != WEIGHT},
        lambda world: {**world.bodies["train"], "net.extra": np.zeros(3, dtype=np.float32)},
        lambda world: {**world.bodies["train"], WEIGHT: np.zeros((8, 9), dtype=np.float32)},
        lambda world: {**world.bodies["train"], WEIGHT: world.bodies["train"][WEIGHT].astype(np.float64)},
        lambda world: {},
    ],
)
def test_arrays_that_are_not_what_the_plan_says_are_refused(untouched: World, spoil: Callable[[World], dict[str, np.ndarray]]) -> None:
    assert untouched.ask("train", 4, arrays=spoil(untouched)).code is Code.ARRAYS


def test_the_first_query_comes_with_no_arrays(untouched: World) -> None:
    assert untouched.ask(arrays={"net.extra": np.zeros(3)}).code is Code.ARRAYS


TOLD_LIES = {
    "nothing": lambda told: {},
    "less": lambda told: {name: array for name, array in told.items() if name != "told.mean"},
    "more": lambda told: {**told, "told.covariance": np.zeros((2, 16, 16))},
    "NaN": lambda told: {**told, "told.mean": np.full_like(told["told.mean"], np.nan)},
    "huge": lambda told: {**told, "told.mean": np.full_like(told["told.mean"], 1e30)},
    "negative scales": lambda told: {**told, "told.scales": -told["told.scales"]},
    "negative energies": lambda told: {**told, "told.energies": -told["told.energies"]},
    "scales of nothing": lambda told: {**told, "told.scales": 0 * told["told.scales"]},
    "no energy": lambda told: {**told, "told.energies": 1e-300 * told["told.energies"]},
    "nobody": lambda told: {**told, "told.counts": 0 * told["told.counts"]},
    "too few axes for the noise to be told": lambda told: {**told, "told.axes": np.array([3.0])},
    "no axis": lambda told: {**told, "told.axes": np.array([0.0])},
    "half an axis": lambda told: {**told, "told.axes": np.array([12.5])},
    "more axes than there are": lambda told: {**told, "told.axes": np.array([17.0])},
}


@pytest.mark.parametrize("lie", TOLD_LIES)
def test_what_no_query_can_have_told_is_refused(untouched: World, lie: str) -> None:
    assert untouched.ask("moments", 3, arrays=TOLD_LIES[lie](told_body(untouched.model, 3))).code is Code.ARRAYS


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (1, {"told.mean": 1e6}),
        (2, {"told.mean": -1e6}),
        (2, {"told.scales": 1e-6}),
        (2, {"told.scales": 1e6}),
        (3, {"told.energies": 1e-6}),
        (3, {"told.energies": 1e6}),
        (3, {"told.mean": 1e6, "told.energies": 1e-6}),
    ],
)
def test_what_was_told_cannot_make_a_patient_add_more_than_the_clip_norm(
    world: World, monkeypatch: pytest.MonkeyPatch, number: int, changes: dict[str, float]
) -> None:
    """Whatever a coordinator says that earlier queries told: two hospitals that differ in one patient answer sums within a clip norm."""
    monkeypatch.setattr(NoisedSums, "_normal", lambda _, name, size: np.zeros(size))
    monkeypatch.setattr(MomentMonitor, "findings", lambda _: {})
    guard, told = world.sites["a"].guard, told_body(world.model, number)
    arrays = {**told, **{name: np.full_like(told[name], value) for name, value in changes.items()}}
    split = split_patients(guard.images, control_fraction=0.2, key=bytes(32))
    query = world.model.release(world.plan).queries[number]
    sums = []
    for training in (split.training, split.training.subset(np.arange(1, split.training.num_patients))):
        release = world.model.release(world.plan).alone(query.name)
        answer = moments_round(
            world.model, replace(split, training=training), world.model.told(arrays, query.name),
            mechanism=release, stream=NoiseStream(key=bytes(32)), record=lambda _: None,
        )  # fmt: skip
        sums.append(answer["sums"])
    assert np.isfinite(sums[0]).all()
    assert np.linalg.norm(sums[0] - sums[1]) <= query.clip_norm * (1 + 1e-9)


def reframed(raw: bytes, *, head: bytes | None = None, body: bytes | None = None) -> bytes:
    length = struct.unpack_from(">4sI", raw)[1]
    own_head, own_body = raw[8 : 8 + length], raw[8 + length :]
    head, body = own_head if head is None else head, own_body if body is None else body
    return struct.pack(">4sI", b"DPSF", len(head)) + head + body


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("something was unpickled",))


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda raw: b"", Code.MALFORMED),
        (lambda raw: raw[:7], Code.MALFORMED),
        (lambda raw: b"HTTP" + raw[4:], Code.MALFORMED),
        (lambda raw: raw[:4] + b"\xff\xff\xff\xff" + raw[8:], Code.MALFORMED),
        (lambda raw: reframed(raw, body=b"more"), Code.MALFORMED),
        (lambda raw: reframed(raw, head=b"{"), Code.MALFORMED),
        (lambda raw: reframed(raw, head=b"[" * 200_000), Code.MALFORMED),
        (lambda raw: reframed(raw, head=b"\xff\xfe"), Code.MALFORMED),
        (lambda raw: reframed(raw, head=b"null"), Code.COORDINATOR),
        (lambda raw: reframed(raw, head=json.dumps({"payload": "", "payloadType": "x", "signatures": []}).encode()), Code.COORDINATOR),
        (lambda raw: reframed(raw, head=raw[8:-10]), Code.MALFORMED),
        (lambda raw: pickle.dumps(Payload()), Code.MALFORMED),
        (lambda raw: raw + bytes(256 << 20), Code.TOO_LARGE),
    ],
)
def test_a_malformed_frame_is_refused_and_never_unpickled(untouched: World, spoil: Callable[[bytes], bytes], code: Code) -> None:
    assert untouched.tell(spoil(untouched.request())).code is code


def statement(world: World, **changes: Any) -> dict[str, Any]:
    import base64

    raw = world.request()
    length = struct.unpack_from(">4sI", raw)[1]
    signed = json.loads(base64.b64decode(json.loads(raw[8 : 8 + length])["payload"]))
    return {**signed, "predicate": {**signed["predicate"], **changes}}


@pytest.mark.parametrize(
    "changes",
    [
        {"round": "0"},
        {"round": True},
        {"round": -1},
        {"round": 4},
        {"kind": "join", "round": 1},
        {"kind": "evaluate"},
        {"study": "../../etc"},
        {"message_id": "a/b"},
        {"message_id": "A" * 81},
        {"protocol": 2},
        {"site": None},
        {"body_sha256": "0" * 64},
        {"extra": 1},
        {"plan": None},
        {"arrays": [{"name": "x", "dtype": "|O", "shape": [1]}]},
        {"arrays": [{"name": "x", "dtype": "<f4", "shape": [-1]}]},
        {"arrays": [{"name": "x", "dtype": "<f8", "shape": [1 << 27, 1 << 27]}]},
        {"arrays": [{"name": "x", "dtype": "<f8", "shape": [0]}, {"name": "x", "dtype": "<f8", "shape": [0]}]},
    ],
)
def test_a_signed_message_outside_the_schema_is_refused(untouched: World, changes: dict[str, Any]) -> None:
    raw, head = untouched.request(), sign_statement(statement(untouched, **changes), untouched.private)
    assert untouched.tell(reframed(raw, head=json.dumps(head).encode())).code is Code.MALFORMED


@pytest.mark.parametrize("sites", [["b", "c"], [], ["../a"], None])
def test_a_study_that_does_not_name_the_site_is_refused(untouched: World, sites: list[str] | None) -> None:
    """Its word would be bound to a list of sites in which it does not stand."""
    good = statement(untouched)
    bad = {**good, "predicate": {**good["predicate"], "plan": {**good["predicate"]["plan"], "sites": sites}}}
    head = json.dumps(sign_statement(bad, untouched.private)).encode()
    assert untouched.tell(reframed(untouched.request(), head=head)).code is Code.MALFORMED


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, 1e300, "1", True, None])
def test_a_plan_with_numbers_that_are_none_is_refused(untouched: World, value: Any) -> None:
    good = statement(untouched)
    bad = {**good, "predicate": {**good["predicate"], "plan": {**good["predicate"]["plan"], "noise_multiplier": value}}}
    if isinstance(value, float) and not np.isfinite(value):
        import base64

        from dpsynth.signing import PAYLOAD_TYPE, key_id, pre_authentication_encoding

        payload = json.dumps(bad).encode()  # with NaN or Infinity, which the signing code would not write
        signature = untouched.private.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
        signatures = [{"keyid": key_id(untouched.private.public_key()), "sig": base64.b64encode(signature).decode()}]
        head = {"payload": base64.b64encode(payload).decode(), "payloadType": PAYLOAD_TYPE, "signatures": signatures}
    else:
        head = sign_statement(bad, untouched.private)
    assert untouched.tell(reframed(untouched.request(), head=json.dumps(head).encode())).code is Code.MALFORMED


def test_a_changed_body_does_not_pass_for_the_signed_one(untouched: World) -> None:
    raw = bytearray(untouched.request("train", 4))
    raw[-1] ^= 1
    assert untouched.tell(bytes(raw)).code is Code.MALFORMED


@pytest.mark.parametrize("size", [1e5, -1e5])
def test_weights_made_to_overflow_neither_stop_a_round_nor_spoil_its_answer(world: World, size: float) -> None:
    """A round that fails for some patients and not for others would tell who is there. It is answered whatever the weights do."""
    arrays = {name: np.full_like(array, size) if name.startswith(NET) else array for name, array in world.bodies["train"].items()}
    reply, answer = decode_reply(world.sites["a"].guard.handle(world.request("train", 4, arrays=arrays)), largest_bytes=1 << 30)
    assert reply.outcome == "ok"
    assert all(np.isfinite(array).all() for array in answer.values())


def test_no_text_of_an_exception_leaves(world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("patient 4711 in /data/xrays")

    monkeypatch.setattr(module, "private_images", fail)
    reply = world.sites["a"].guard.handle(world.request())
    assert decode_reply(reply, largest_bytes=1 << 20)[0].code is Code.FAILED
    assert b"4711" not in reply
    assert b"xrays" not in reply
    assert "4711" in caplog.text, "the hospital's own log must say what happened"
