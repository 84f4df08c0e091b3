"""The verb train as a whole: what was booked is what was done, and a run that was killed while closing is closed once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from scipy import stats

import dpsynth.train.run as module
from dpsynth.artifacts import RunFolder
from dpsynth.config import Config, parse_config
from dpsynth.data.fingerprint import open_ledger
from dpsynth.errors import ArtifactError, BudgetExceeded
from dpsynth.model.moments import _COUNT_WEIGHT
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.noise import NoiseStream
from dpsynth.progress import silent

CONFIG = """\
data: {declared_patients: 200, phantom: {num_patients: 240, max_images: 2}}
privacy: {epsilon: 10}
pretrain: {num_phantoms: 150, steps: 2, cache: CACHE}
diffusion: {steps: 3, sampling_probability: 0.05, draws: 1, channels: [8, 16]}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return parse_config(CONFIG.replace("CACHE", str(tmp_path_factory.mktemp("cache"))), base=Path("/"))


@pytest.fixture
def ledger(config: Config, tmp_path: Path) -> Ledger:
    return open_ledger(config, path=tmp_path / "ledger.jsonl", epsilon=10.0, delta=None, max_gate_attempts=1, progress=silent)


@pytest.fixture
def train(config: Config, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    monkeypatch.setattr(module, "fresh_key", lambda: b"k" * 32)

    def run(name: str = "run", **changes: object) -> object:
        settings = config.model_copy(update=changes)
        return module.train(settings, run_path=tmp_path / name, ledger_path=ledger.path, progress=silent)

    return run


def test_the_released_moments_hold_the_noise_that_the_ledger_charges(
    train: Callable[..., object], ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train twice with one key, once without the noise of the means: the difference must have the size that the ledger's own bytes say."""
    seen = []
    monkeypatch.setattr(module, "public_reference", lambda *a, _make=module.public_reference, **k: seen.append(_make(*a, **k)) or seen[-1])
    train("noised", method="moments")
    (line,) = [entry for entry in map(json.loads, ledger.path.read_text().splitlines()) if entry["type"] == "reserve"]
    (booked,) = line["mechanisms"]
    (query,) = [query for query in booked["queries"] if query["name"] == "means"]
    stddev = query["clip_norm"] * booked["noise_multiplier"] / math.sqrt(query["share"])

    real = NoiseStream.normal

    def silenced(self: NoiseStream, purpose: str, step: int, size: int) -> np.ndarray:
        return real(self, purpose, step, size) * (0 if "means" in purpose else 1)

    monkeypatch.setattr(NoiseStream, "normal", silenced)
    monkeypatch.setattr(Ledger, "reserve", lambda self, *_, run_id, **__: _again(self, run_id))
    train("exact", method="moments")
    sums = []
    for name in ("noised", "exact"):
        arrays = load_file(tmp_path / name / "train" / "weights.safetensors")
        counts, mean = arrays["moments.counts"].numpy(), arrays["moments.mean"].numpy()
        sums.append(np.concatenate([counts[:, None] * _COUNT_WEIGHT * seen[0].clip_low, (mean - seen[0].centre) * counts[:, None]], axis=1))
    noise = (sums[0] - sums[1]) / stddev
    energy = float(np.sum(noise**2))
    p = 2 * min(stats.chi2.cdf(energy, noise.size), stats.chi2.sf(energy, noise.size))
    assert p > 1e-6, f"{np.sqrt(energy / noise.size):.3f} of the booked standard deviation"
    assert 2 * min(stats.chi2.cdf(energy / 2, noise.size), stats.chi2.sf(energy / 2, noise.size)) < 1e-6, "no power"


def _again(ledger: Ledger, run_id: str) -> str:
    """Stands in for a reservation that the budget would refuse: hands out the one that was made."""
    del run_id
    return ledger.charges()[0].reservation


def test_dp_sgd_is_given_what_the_ledger_holds(train: Callable[..., object], ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def keep(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            given[name] = kwargs.get("mechanism", args[2] if len(args) > 2 else None)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(module, "fit", keep("sgd", module.fit))
    monkeypatch.setattr(module, "release_moments", keep("moments", module.release_moments))
    guarantee = train()
    booked = ledger.charges()[0].mechanisms
    assert (given["moments"], given["sgd"]) == booked
    assert guarantee.mechanisms == booked  # type: ignore[attr-defined]


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", ["before the settlement", "after the settlement", "between the secrets", "before the record"])
def test_a_run_killed_while_closing_is_closed_once(
    moment: str, train: Callable[..., object], ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        real_settle, real_unlink = Ledger.settle, Path.unlink

        def settle(self: Ledger, reservation: str, **rest: object) -> None:
            if moment == "after the settlement":
                real_settle(self, reservation, **rest)  # type: ignore[arg-type]
            raise Killed

        def unlink(self: Path, **rest: bool) -> None:
            if self.name == "checkpoint.safetensors":
                raise Killed
            real_unlink(self, **rest)

        def complete(*_: object, **__: object) -> None:
            raise Killed

        if "settlement" in moment:
            patch.setattr(Ledger, "settle", settle)
        elif "secrets" in moment:
            patch.setattr(Path, "unlink", unlink)
        else:
            patch.setattr(RunFolder, "complete", complete)
        with pytest.raises(Killed):
            train()
    weights = (tmp_path / "run" / "train" / "weights.safetensors").read_bytes()
    train()
    (charge,) = ledger.charges()
    assert charge.settled
    assert (tmp_path / "run" / "train" / "weights.safetensors").read_bytes() == weights
    site = {path.name for path in (tmp_path / "run" / "train" / "site").iterdir()}
    assert not site & {"key", "checkpoint.safetensors"}
    before = ledger.path.read_bytes()
    assert train() == train()
    assert ledger.path.read_bytes() == before


def test_a_refused_budget_leaves_no_run_behind(train: Callable[..., object], ledger: Ledger, tmp_path: Path) -> None:
    train("first", method="moments")
    with pytest.raises(BudgetExceeded):
        train("second", method="moments")
    assert not (tmp_path / "second").exists()
    assert len(ledger.charges()) == 1


def test_a_charged_run_whose_key_is_gone_is_not_charged_again(
    train: Callable[..., object], ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "fit", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train()
    (tmp_path / "run" / "train" / "site" / "key").unlink()
    with pytest.raises(ArtifactError, match="key is gone"):
        train()
    assert len(ledger.charges()) == 1
