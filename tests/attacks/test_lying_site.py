"""A site that answers with garbage: noticed, named and left out, and the others' result is as if it had not been there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from federation_cases import FACTS, Hospital, World, initial, study

from federated.coordinator import QuorumLost
from federated.messages import decode_reply, decode_request, encode_reply
from federated.rounds import MOMENTS, NET

Arrays = dict[str, np.ndarray]


def lying(world: World, lie: Callable[[Arrays, Arrays], Arrays], *, kind: str) -> Callable[[bytes], bytes]:
    """An honest hospital whose answers to one kind of question are changed."""
    honest = Hospital(world, 2)

    def handle(raw: bytes) -> bytes:
        signed = decode_request(raw, coordinators=(world.private.public_key(),), largest_bytes=len(raw))
        _, arrays = decode_reply(honest(raw), largest_bytes=1 << 30)
        told = lie(dict(arrays), dict(signed.arrays)) if signed.request.kind == kind else arrays
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
MOMENT_LIES = {
    "counts beyond the declared": lambda arrays, _: {**arrays, MOMENTS + "counts": arrays[MOMENTS + "counts"] * 1e4},
    "negative counts": lambda arrays, _: {**arrays, MOMENTS + "counts": -arrays[MOMENTS + "counts"]},
    "negative variance": lambda arrays, _: {**arrays, MOMENTS + "variance": -arrays[MOMENTS + "variance"]},
    "indefinite covariance": lambda arrays, _: {**arrays, MOMENTS + "covariance": -arrays[MOMENTS + "covariance"]},
    "no variance": lambda arrays, _: {name: array for name, array in arrays.items() if name != MOMENTS + "variance"},
    "asymmetric covariance": lambda arrays, _: {**arrays, MOMENTS + "covariance": arrays[MOMENTS + "covariance"] + np.triu(np.ones(16), 1)},
}


@pytest.mark.parametrize("lie", TRAINING_LIES)
def test_a_poisoned_update_is_left_out(empty: World, tmp_path: Path, lie: str) -> None:
    honest = {name: Hospital(empty, seed) for seed, name in enumerate("ab")}
    without = study(empty, honest, tmp_path / "without", sites=("a", "b")).run(initial(empty))
    honest = {name: Hospital(empty, seed) for seed, name in enumerate("ab")}
    liar = lying(empty, TRAINING_LIES[lie], kind="train")
    coordinator = study(empty, {**honest, "c": liar}, tmp_path / "with")
    state = coordinator.run(initial(empty))
    for name in initial(empty):
        np.testing.assert_array_equal(state.arrays[name], without.arrays[name])
    events = (tmp_path / "with" / "events.jsonl").read_text().splitlines()
    assert sum('"unusable"' in event and '"site": "c"' in event for event in events) == 2
    assert not any('"unusable"' in event and '"site": "c"' not in event for event in events)


@pytest.mark.parametrize("lie", MOMENT_LIES)
def test_false_moments_are_left_out(empty: World, tmp_path: Path, lie: str) -> None:
    honest = {name: Hospital(empty, seed) for seed, name in enumerate("ab")}
    coordinator = study(empty, {**honest, "c": lying(empty, MOMENT_LIES[lie], kind="moments")}, tmp_path / "study")
    state = coordinator.run(initial(empty))
    np.testing.assert_allclose(state.arrays[MOMENTS + "counts"], 2 * empty.bodies["train"][MOMENTS + "counts"])


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
