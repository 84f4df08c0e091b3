"""A guard or a coordinator that dies, or whose disk is full, at each of its operations on files in turn: once it is started again, or has
space, the answers and the result are those of an undisturbed one, and every round is charged once.

All operations, and not some of them, take minutes: pytest -m slow tests/federated/test_crash_points.py
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from crash_points import Killed, breaking
from federation_cases import Handler, Hospital, World, initial, study

from dpsynth.artifacts import RunFolder
from dpsynth.errors import ArtifactError, StorageError
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.ledger import Ledger
from federated.messages import Code, decode_reply
from federated.outcome import write_outcome
from federated.progress_view import describe, progress_of
from federated.site import Guard

NEVER = 10**9


@pytest.fixture(autouse=True)
def nothing_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def again(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Guard]]:
    """The site as it was at first, with a guard that has just been started. Keys are known, so that runs can be compared bit by bit."""
    monkeypatch.setattr("federated.journal.fresh_key", lambda: b"k" * 32)
    site, kept = world.sites["a"], tmp_path / "kept"
    images = site.guard.images
    shutil.copytree(site.folder, kept)

    def restored() -> Guard:
        shutil.rmtree(site.folder)
        shutil.copytree(kept, site.folder)
        return started(world, images)

    return restored


def started(world: World, images: object) -> Guard:
    guard = world.sites["a"].restart()
    guard.__dict__["_read"] = (1, images)  # read once for all restarts
    return guard


def code_of(raw: bytes) -> Code | None:
    return decode_reply(raw, largest_bytes=1 << 30)[0].code


def some(*values: object, stride: int, name: str) -> list[object]:
    """A case at every so many operations, and a slow one at all of them."""
    return [pytest.param(*values, stride, id=name), pytest.param(*values, 1, id=f"{name}-all", marks=pytest.mark.slow)]


CASES = [
    *some("moments", 0, "", False, stride=2, name="killed-in-moments"),
    *some("moments", 0, "", True, stride=3, name="full-in-moments"),
    *some("train", 4, "checkpoint", False, stride=14, name="killed-at-a-checkpoint"),
    *some("train", 4, "checkpoint", True, stride=4, name="full-at-a-checkpoint"),
    pytest.param("train", 4, "", False, 1, id="killed-in-training-all", marks=pytest.mark.slow),
    pytest.param("train", 4, "", True, 1, id="full-in-training-all", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "number", "file", "full", "stride"), CASES)
def test_a_guard_that_breaks_at_any_operation_charges_once_and_gives_the_same_answer(
    world: World, again: Callable[[], Guard], kind: str, number: int, file: str, full: bool, stride: int
) -> None:
    site, message = world.sites["a"], world.request(kind, number)
    guard = again()
    with breaking(site.folder, NEVER, full=full) as undisturbed:
        whole = guard.handle(message)
    assert code_of(whole) is None
    images, charges_at_the_break = guard.images, set()
    for at in [at for at, name in enumerate(undisturbed.seen, 1) if file in name][::stride]:
        guard = again()
        with breaking(site.folder, at, full=full) as point:
            try:
                answer = guard.handle(message)
            except Killed:
                answer = None
        assert point.passed
        assert answer is None or answer == whole or code_of(answer) is Code.FAILED
        charges_at_the_break.add(len(guard.ledger.charges()))
        guard = started(world, images) if at % 2 or not full else guard
        assert guard.handle(message) == whole, f"operation {at}"
        assert [(charge.run_id, charge.settled) for charge in guard.ledger.charges()] == [(f"study/{number}/{kind}-{number}", True)]
        assert Ledger.problems_of(guard.ledger.path) == []
        assert not list(site.policy.state.rglob("key")), "the secret of a finished round must not outlive it"
    assert charges_at_the_break == ({1} if file else {0, 1})


def test_a_guard_that_died_after_keeping_its_answer_forgets_the_key_when_it_starts(world: World, again: Callable[[], Guard]) -> None:
    """Whoever got hold of the key of a round could take its noise off."""
    guard, state = again(), world.sites["a"].policy.state
    with breaking(world.sites["a"].folder, NEVER, full=False) as undisturbed:
        guard.handle(world.request())
    kept = max(at for at, name in enumerate(undisturbed.seen, 1) if name.startswith(".reply."))
    guard = again()
    with pytest.raises(Killed), breaking(world.sites["a"].folder, kept + 2, full=False):
        guard.handle(world.request())
    assert list(state.rglob("reply"))
    assert list(state.rglob("key"))
    world.sites["a"].restart()
    assert list(state.rglob("reply"))
    assert not list(state.rglob("key"))


def test_a_coordinator_that_dies_while_it_writes_the_run_writes_it_again_and_takes_no_other(
    empty: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("federated.outcome.prv_epsilon", epsilon_pld)  # as a second opinion, which takes seconds
    coordinator = study(empty, {name: Hospital(empty, seed) for seed, name in enumerate("abc")}, tmp_path / "study")
    state = coordinator.run(initial(empty))
    with breaking(tmp_path / "whole", NEVER, full=False) as undisturbed:
        guarantee = write_outcome(coordinator, state, run_path=tmp_path / "whole" / "run")
    monkeypatch.setattr("federated.outcome._claim", lambda *_, **__: guarantee)
    whole = (tmp_path / "whole" / "run" / "train" / "weights.safetensors").read_bytes()
    for at in range(2, len(undisturbed.seen) + 1, 5):
        path = tmp_path / str(at) / "run"
        with pytest.raises(Killed), breaking(tmp_path / str(at), at, full=False):
            write_outcome(coordinator, state, run_path=path)
        write_outcome(coordinator, state, run_path=path)
        RunFolder.open(path).require("train")
        assert (path / "train" / "weights.safetensors").read_bytes() == whole
    (path / "train" / "stage.json").unlink()
    (path / "train" / "site").mkdir()
    with pytest.raises(ArtifactError, match="holds another run"):
        write_outcome(coordinator, state, run_path=path)


class Kept:
    """A hospital that answers as a guard does: the same bytes to the same question, whichever process asks."""

    def __init__(self, world: World, seed: int) -> None:
        self.hospital, self.answers = Hospital(world, seed), {}

    def __call__(self, raw: bytes) -> bytes:
        if raw not in self.answers:
            self.hospital.rng = np.random.default_rng(int.from_bytes(hashlib.sha256(raw).digest()[:8]))
            self.answers[raw] = self.hospital(raw)
        return self.answers[raw]


@pytest.mark.parametrize(("full", "stride"), [*some(False, stride=29, name="killed"), *some(True, stride=31, name="full")])
def test_a_coordinator_that_breaks_at_any_operation_asks_nobody_twice_and_ends_the_same(
    empty: World, tmp_path: Path, full: bool, stride: int
) -> None:
    sites: dict[str, Handler] = {name: Kept(empty, 0) for name in "abc"}
    with breaking(tmp_path / "whole", NEVER, full=full) as undisturbed:
        whole = study(empty, sites, tmp_path / "whole").run(initial(empty))
    asked = {name: set(site.answers) for name, site in sites.items()}
    assert len(asked["a"]) == 7
    for at in range(1, len(undisturbed.seen) + 1, stride):
        folder = tmp_path / str(at)
        with breaking(folder, at, full=full) as point, contextlib.suppress(Killed, StorageError):
            study(empty, sites, folder).run(initial(empty))
        assert point.passed
        if (folder / "study.json").is_file():
            assert describe(progress_of(folder)), f"operation {at}"
        coordinator = study(empty, sites, folder)
        state = coordinator.run(initial(empty))
        assert state.round == whole.round
        for name, array in whole.arrays.items():
            np.testing.assert_array_equal(state.arrays[name], array, err_msg=f"operation {at}")
        assert coordinator.asked == {name: list(range(6)) for name in "abc"}
        assert {name: set(site.answers) for name, site in sites.items()} == asked, "another question would be another charge"
        shutil.rmtree(folder)
