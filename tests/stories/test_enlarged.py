"""Images too large to learn from: patients teach the coarse image, public ones its detail, and checks see the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import dpsynth.train.run as module
from dpsynth.artifacts import RunFolder
from dpsynth.checks.run import check
from dpsynth.config import Config, parse_config
from dpsynth.data.candidates import load_candidates
from dpsynth.data.fingerprint import open_ledger
from dpsynth.data.halve import halved
from dpsynth.generate import generate
from dpsynth.model.generator import Generator
from dpsynth.plan import describe, plan
from dpsynth.privacy.ledger import Ledger
from dpsynth.progress import silent
from dpsynth.train.pretrain_enlarger import pretrained_enlargers
from dpsynth.train.public import public_images
from dpsynth.trained import read_claim

CONFIG = """\
data: {declared_patients: 200, spatial_shape: [56, 64], phantom: {num_patients: 240, max_images: 2, seed: SEED}}
privacy: {epsilon: 10}
moments: {low_frequencies: 6}
pretrain: {num_phantoms: 80, steps: 3, batch_size: 16, cache: CACHE}
diffusion: {steps: 2, sampling_probability: 0.05, draws: 1, channels: [8, 16]}
generate: {count: 40, steps: 3}
gate: {required: [accounting, mechanism, membership, copying, content, white_box]}
"""


def trained(folder: Path, *, seed: int, cache: Path) -> tuple[Config, Path]:
    folder.mkdir()
    config = parse_config(CONFIG.replace("CACHE", str(cache)).replace("SEED", str(seed)), base=folder)
    open_ledger(config, path=folder / "ledger.jsonl", epsilon=10.0, delta=None, max_gate_attempts=1, progress=silent)
    module.train(config, run_path=folder / "run", ledger_path=folder / "ledger.jsonl", progress=silent)
    return config, folder / "run"


def test_patients_teach_the_coarse_image_and_nothing_of_them_is_in_what_enlarges_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[tuple[int, ...]]] = {}

    def keep(name: str, real: Callable[..., object], position: int) -> None:
        def call(*args: object, **named: object) -> object:
            given = args[position]
            seen.setdefault(name, []).append(getattr(given, "images", given).shape)  # type: ignore[attr-defined]
            return real(*args, **named)

        monkeypatch.setattr(module, name, call)

    for name, position in (("release_moments", 0), ("fit", 1), ("pretrained_weights", 1), ("pretrained_enlargers", 1)):
        keep(name, getattr(module, name), position)
    config, run = trained(tmp_path / "one", seed=0, cache=tmp_path / "cache")
    assert {shape[1:] for shape in seen["release_moments"] + seen["fit"] + seen["pretrained_weights"]} == {(1, 28, 32)}
    assert {shape[1:] for shape in seen["pretrained_enlargers"]} == {(1, 56, 64)}
    _, other = trained(tmp_path / "other", seed=9, cache=tmp_path / "cache")
    one, two = (Generator.load(path / "train") for path in (run, other))
    (public,) = pretrained_enlargers(config, public_images(config, progress=silent), progress=silent)
    for name, tensor in public.state_dict().items():
        assert torch.equal(tensor, one.enlargers[0].state_dict()[name]), name
        assert torch.equal(tensor, two.enlargers[0].state_dict()[name]), name
    assert not np.array_equal(one.moments.mean, two.moments.mean)
    told = "constants, detail finer than [28, 32] and pre-training from procedural images"
    assert told in read_claim(RunFolder.open(run)).unprotected
    assert ("from public images alone", "detail finer than [28, 32]") in describe(plan(config))

    generate(run, progress=silent)
    candidates = load_candidates(RunFolder.open(run))
    assert candidates.images.shape[1:] == one.shape == (1, 56, 64)
    verdicts = {verdict.check: verdict for verdict in check(run, ledger_path=tmp_path / "one" / "ledger.jsonl", progress=silent)}
    assert {"content", "copying", "white_box"} <= set(verdicts)
    assert "structure" not in verdicts["content"].reason, "the moments are compared at their own size"


def test_private_images_among_the_public_ones_stop_the_run_at_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At full size, as a public folder holds them: the enlarger would learn them free of charge."""

    def some_private(config: Config, **_: object) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return module.prepare(module.read_cohort(config.data), config.data, progress=silent).images[:150]

    monkeypatch.setattr(module, "public_images", some_private)
    with pytest.raises(module.DataError, match="150 of the public images"):
        trained(tmp_path / "run", seed=0, cache=tmp_path / "cache")
    assert Ledger.load(tmp_path / "run" / "ledger.jsonl").charges() == ()
    assert not (tmp_path / "cache").exists(), "nothing was learnt"


def test_a_private_image_among_the_public_ones_is_found_at_the_size_that_is_learnt_from() -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (4, 1, 56, 56)).astype(np.float32)
    with pytest.raises(module.DataError, match="1 of the public images"):
        module.require_disjoint(halved(images[:3]), halved(images[2:]))
