"""Training that is killed, over and over, or that runs out of space: no charge is lost, none is doubled, and the result is the same."""

from __future__ import annotations

import multiprocessing
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dpsynth.train.run as run_module
from dpsynth.config import Config, parse_config
from dpsynth.data.fingerprint import open_ledger
from dpsynth.errors import StorageError
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.calibrate import resolve_delta
from dpsynth.privacy.ledger import Ledger
from dpsynth.progress import silent

CONFIG = """\
data: {declared_patients: 200, phantom: {num_patients: 240, max_images: 2}}
privacy: {epsilon: 10}
pretrain: {num_phantoms: 150, steps: 3, cache: CACHE}
diffusion: {steps: 12, sampling_probability: 0.05, draws: 1, channels: [8, 16], checkpoint_every: 1}
"""
KILLS = 20
Start = Callable[..., multiprocessing.context.ForkServerProcess]


def config(folder: Path) -> Config:
    return parse_config(CONFIG.replace("CACHE", str(folder / "cache")), base=folder)


def train_here(folder: Path, name: str, largest_file: int | None = None) -> None:
    """Train with a known key, so that two runs can be compared bit by bit."""
    torch.set_num_threads(1)
    run_module.fresh_key = lambda: b"k" * 32
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    try:
        run_module.train(config(folder), run_path=folder / name, ledger_path=folder / f"{name}.jsonl", progress=silent)
    except StorageError as error:
        (folder / "refusal.txt").write_text(str(error))


@pytest.fixture(scope="module")
def start() -> Start:
    """Starts `train_here` in a process of its own; torch is imported once, in the server that they are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dpsynth.train.run"])

    def begin(*arguments: object) -> multiprocessing.context.ForkServerProcess:
        process = context.Process(target=train_here, args=arguments)
        process.start()
        return process

    return begin


def open_for(folder: Path, name: str) -> Ledger:
    return open_ledger(config(folder), path=folder / f"{name}.jsonl", epsilon=10.0, delta=None, max_gate_attempts=1, progress=silent)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, start: Start) -> tuple[Path, float]:
    """A folder with one uninterrupted run, and the seconds that it took once the pre-trained weights were in the cache."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("first", "whole"):
        open_for(folder, name)
        begun = time.monotonic()
        process = start(folder, name)
        process.join()
        assert finished(folder, name)
    return folder, time.monotonic() - begun


def finished(folder: Path, name: str) -> bool:
    return (folder / name / "train" / "stage.json").exists()


def charged_once(ledger: Ledger) -> bool:
    """Nothing wrong with the ledger, and either no reservation yet or exactly one at its full price."""
    assert Ledger.problems_of(ledger.path) == []
    charges = ledger.charges()
    assert len(charges) <= 1
    if charges:
        assert 9.5 < epsilon_pld(charges[0].mechanisms, resolve_delta(None, 200)) <= 10
    return bool(charges)


def same_weights(folder: Path, name: str, other: str) -> bool:
    ours, theirs = (load_file(folder / run / "train" / "weights.safetensors") for run in (name, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_twenty_kills_lose_no_charge_and_change_no_bit(whole: tuple[Path, float], start: Start) -> None:
    folder, duration = whole
    moment, kills, runs, reserved_and_unfinished = random.Random(11), 0, 0, 0
    while kills < KILLS:
        name, runs = f"killed{runs}", runs + 1
        ledger = open_for(folder, name)
        while not finished(folder, name):
            process = start(folder, name)
            process.join(moment.uniform(0.02, 0.9) * duration if kills < KILLS else None)
            if process.is_alive():
                process.kill()
                process.join()
                kills += 1
            reserved_and_unfinished += charged_once(ledger) and not finished(folder, name)
        assert charged_once(ledger)
        assert ledger.charges()[0].settled
        assert not (folder / name / "train" / "site" / "key").exists()
        assert same_weights(folder, name, "whole")
    assert reserved_and_unfinished >= KILLS // 4, "too few kills fell between reservation and settlement"


def test_no_space_left_is_one_line_keeps_the_charge_and_resumes(whole: tuple[Path, float], start: Start) -> None:
    """A limit on the size of files, above the ledger's and below the checkpoint's, stands in for a full disk."""
    folder, _ = whole
    ledger = open_for(folder, "full")
    short = start(folder, "full", 20_000)
    short.join()
    message = (folder / "refusal.txt").read_text()
    assert "space" in message
    assert "\n" not in message
    assert charged_once(ledger)
    assert not finished(folder, "full")
    again = start(folder, "full")
    again.join()
    assert charged_once(ledger)
    assert same_weights(folder, "full", "whole")
