"""A site that answers with garbage: noticed, named and left out, and the others' result is as if it had not been there."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from federation_cases import FACTS, Hospital, World, initial, public_summaries, study

from federated.coordinator import QuorumLost
from federated.messages import Code, decode_reply, decode_request, encode_refusal, encode_reply
from federated.rounds import MOMENTS, NET, SUMS

Arrays = dict[str, np.ndarray]


def lying(world: World, lie: Callable[[Arrays, Arrays], Arrays], *, kind: str, number: int | None = None) -> Callable[[bytes], bytes]:
    """An honest hospital whose answers to one kind of question, or to that of one round, are changed."""
    honest = Hospital(world, 2)

    def handle(raw: bytes) -> bytes:
        signed = decode_request(raw, coordinators=(world.private.public_key(),), largest_bytes=len(raw))
        _, arrays = decode_reply(honest(raw), largest_bytes=1 << 30)
        asked = signed.request.kind == kind and number in (None, signed.request.round)
        told = lie(dict(arrays), dict(signed.arrays)) if asked else arrays
        return encode_reply(request_sha256=signed.digest, facts=FACTS, arrays=told)

    return handle


def scaled(arrays: Arrays, before: Arrays, factor: float) -> Arrays:
    return {name: (before[name] + factor * (array - before[name])).astype(np.float32) for name, array in arrays.items()}


NAME = NET + "out.2.conv.weight"
TRAINING_LIES = {
    "NaN": lambda arrays, _: {**arrays, NAME: np.full_like(arrays[NAME], np.nan)},
    "infinite": lambda arrays, _: {**arrays, NAME: np.full_like(arrays[NAME], np.inf)},
    "another shape": lambda arrays, _: {**arrays, NAME: arrays[NAME][:1]},
    "another type": lambda arrays, _: {**arrays, NAME: arrays[NAME].astype(np.float64)},
    "missing": lambda arrays, _: {},
    "1000 times the norm": lambda arrays, before: scaled(arrays, before, 1000.0),
    "10 times the norm": lambda arrays, before: scaled(arrays, before, 10.0),
    "nothing done": lambda arrays, before: scaled(arrays, before, 0.0),
}
SUM_LIES = {
    "NaN": lambda sums: np.full_like(sums, np.nan),
    "infinite": lambda sums: np.where(np.arange(sums.shape[1]) == 1, np.inf, sums),
    "another shape": lambda sums: sums[:, :-1],
    "another type": lambda sums: sums.astype(np.float32),
    "one number beyond what its patients can add": lambda sums: sums + 1e4 * np.abs(sums).max() * np.eye(*sums.shape)[:, ::-1],
    "100 times the sums": lambda sums: 100 * sums,
}
COUNT_LIES = {
    "counts beyond the declared": lambda sums: np.where(np.arange(sums.shape[1]) == 0, 1e5, sums),
    "negative counts": lambda sums: -10 * sums,
}


@pytest.mark.parametrize("lie", TRAINING_LIES)
def test_a_poisoned_update_is_left_out(empty: World, tmp_path: Path, lie: str) -> None:
    honest = {name: Hospital(empty, seed) for seed, name in enumerate("ab")}
    without = study(empty, honest, tmp_path / "without", sites=("a", "b")).run(initial(empty))
    honest = {name: Hospital(empty, seed) for seed, name in enumerate("ab")}
    liar = lying(empty, TRAINING_LIES[lie], kind="train")
    coordinator = study(empty, {**honest, "c": liar}, tmp_path / "with")
    state = coordinator.run(initial(empty))
    for name in initial(empty)():
        np.testing.assert_array_equal(state.arrays[name], without.arrays[name])
    events = (tmp_path / "with" / "events.jsonl").read_text().splitlines()
    assert sum('"unusable"' in event and '"site": "c"' in event for event in events) == 2
    assert not any('"unusable"' in event and '"site": "c"' not in event for event in events)


@pytest.mark.parametrize(("number", "lie"), [*product(range(4), SUM_LIES), *product([0], COUNT_LIES)])
def test_false_sums_of_a_query_are_left_out(empty: World, tmp_path: Path, number: int, lie: str) -> None:
    """The released moments are those of a study in which this site gave no answer to this query."""
    told = (SUM_LIES | COUNT_LIES)[lie]

    def silent(raw: bytes) -> bytes:
        signed = decode_request(raw, coordinators=(empty.private.public_key(),), largest_bytes=len(raw))
        gone = signed.request.kind == "moments" and signed.request.round == number
        return encode_refusal(Code.HOURS, request_sha256=signed.digest) if gone else third(raw)

    third, found = Hospital(empty, 2), []
    liar = lying(empty, lambda arrays, _: {SUMS: told(arrays[SUMS])}, kind="moments", number=number)
    for handler, name in ((liar, "lying"), (silent, "silent")):
        sites = {site: Hospital(empty, seed) for seed, site in enumerate("ab")}
        found.append(study(empty, {**sites, "c": handler}, tmp_path / name, rounds=1).run(initial(empty)))
    for name, array in found[0].arrays.items():
        if name.startswith(MOMENTS):
            np.testing.assert_array_equal(array, found[1].arrays[name])
    events = [json.loads(line) for line in (tmp_path / "lying" / "events.jsonl").read_text().splitlines()]
    unusable = [(event["site"], event["round"]) for event in events if event["outcome"] == "unusable"]
    assert unusable == [("c", number)]


@pytest.mark.parametrize("answer", [b"", b"garbage", b"DPSF\x00\x00\x00\x02{}", b"DPSF\x00\x00\x00\x02[]" + b"x" * 100])
def test_garbage_is_an_unusable_answer_and_too_much_of_it_loses_the_quorum(empty: World, tmp_path: Path, answer: bytes) -> None:
    honest = {"a": Hospital(empty, 0)}
    with pytest.raises(QuorumLost, match="b: the answer cannot be used"):
        study(empty, {**honest, "b": lambda _: answer, "c": lambda _: answer}, tmp_path / "study").run(initial(empty))


def test_an_answer_to_another_question_is_not_used(empty: World, tmp_path: Path) -> None:
    honest = {name: Hospital(empty, seed) for seed, name in enumerate("ab")}
    third = Hospital(empty, 2)
    stale = lambda raw: encode_reply(request_sha256="1" * 64, facts=FACTS, arrays=decode_reply(third(raw), largest_bytes=1 << 30)[1])  # noqa: E731
    coordinator = study(empty, {**honest, "c": stale}, tmp_path / "study")
    coordinator.run(initial(empty))
    assert "the answer is to another question" in (tmp_path / "study" / "events.jsonl").read_text()
    assert "c" not in coordinator.facts


def test_a_site_cannot_grow_by_declaring_more_than_it_said_at_first(empty: World, tmp_path: Path) -> None:
    """A thousand times the sums with a thousand times the declared patients: all of the moments would be the liar's."""
    honest = {name: Hospital(empty, seed) for seed, name in enumerate("abc")}

    def grown(raw: bytes) -> bytes:
        signed = decode_request(raw, coordinators=(empty.private.public_key(),), largest_bytes=len(raw))
        _, arrays = decode_reply(honest["c"](raw), largest_bytes=1 << 30)
        if signed.request.kind != "moments":
            return encode_reply(request_sha256=signed.digest, facts=FACTS, arrays=arrays)
        facts = FACTS.model_copy(update={"declared_patients": 1_000_000})
        return encode_reply(request_sha256=signed.digest, facts=facts, arrays={SUMS: 1000 * arrays[SUMS]})

    coordinator = study(empty, {**honest, "c": grown}, tmp_path / "study", rounds=0)
    state = coordinator.run(initial(empty))
    assert coordinator.answered.get("c", []) == []
    assert state.arrays[MOMENTS + "counts"].sum() == pytest.approx(2 * len(public_summaries(empty.model).labels))
