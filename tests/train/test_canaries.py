"""Gradient canaries: they change nothing that is trained, their scores are what they claim to be, and a killed run goes on with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loop import MECHANISM, PATIENTS, SETTINGS, STREAM, TRAINING, Killed, equal, fresh_denoiser, trained

from dpsynth.privacy.audit import Audit, outcome
from dpsynth.privacy.mechanism import PoissonDpSgd
from dpsynth.privacy.noise import NoiseStream
from dpsynth.train import loop
from dpsynth.train.canaries import NUMBER, TOY, Canaries, require_audit, start_up_audit
from dpsynth.train.dpsgd import ENGINE
from dpsynth.train.loop import fit
from dpsynth.train.monitor import Monitor
from dpsynth.train.poisson import poisson_batch


def monitor_of(path: Path, *, stop_after: int | None = None, engine: object = ENGINE) -> Monitor:
    def callback(step: int) -> None:
        if step == stop_after:
            raise Killed

    return fit(
        fresh_denoiser(), TRAINING, MECHANISM, SETTINGS, stream=STREAM, checkpoint=path, binding="r", callback=callback, engine=engine
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [1, 300])
def test_no_number_of_canaries_changes_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    usual = trained(tmp_path / "usual")
    monkeypatch.setattr(loop, "NUMBER", number)
    assert equal(trained(tmp_path / "other"), usual)


def test_without_noise_a_score_is_how_often_its_canary_took_part(tmp_path: Path) -> None:
    def no_noise(total: torch.Tensor, *, mechanism: PoissonDpSgd, **_: object) -> torch.Tensor:
        return total.double() / mechanism.expected_batch_size

    monitor = monitor_of(tmp_path / "x", engine=replace(ENGINE, noise=no_noise))
    inside = Canaries.drawn(STREAM, scores=[], number=NUMBER).inside
    times = np.zeros(NUMBER)
    for step in range(MECHANISM.steps):
        drawn = poisson_batch(STREAM, step=step, probability=MECHANISM.sampling_probability, num_patients=PATIENTS + NUMBER)
        times[drawn[drawn >= PATIENTS] - PATIENTS] += 1
    assert np.allclose(monitor.canary_scores, times * inside, atol=1e-5)
    assert 0.4 < inside.mean() < 0.6


def test_a_killed_run_shows_the_same_canaries(tmp_path: Path) -> None:
    whole = monitor_of(tmp_path / "whole")
    with pytest.raises(Killed):
        monitor_of(tmp_path / "stopped", stop_after=3)
    again = monitor_of(tmp_path / "stopped")
    assert again.canary_scores == whole.canary_scores
    assert again.canaries == whole.canaries
    assert whole.canaries is not None
    assert whole.canaries.mechanism == MECHANISM


def test_the_real_engine_stays_below_its_claim() -> None:
    """And its scores follow the law that the accounting assumes, simulated here without the engine."""
    for key in (b"a" * 32, b"b" * 32):
        audit = start_up_audit(key=key)
        require_audit(audit)
        assert audit.p_value() > 0.05
        bounds = audit.lower_bounds(1e-5)
        assert 0.3 < bounds["one run, curve"] < audit.claimed(1e-5)
        assert max(bounds.values()) < audit.claimed(1e-5) * 1.5
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(10):
        inside = rng.random(3000) < 0.5
        scores = inside * rng.binomial(TOY.steps, TOY.sampling_probability, 3000) + rng.normal(
            0, TOY.noise_multiplier * np.sqrt(TOY.steps), 3000
        )
        rates.append(outcome(scores, inside, TOY).correct / 300)
    assert abs(audit.correct / audit.guesses - np.mean(rates)) < 0.08


def test_an_audit_survives_json_and_counts_what_it_says() -> None:
    inside = np.array([True, False] * 50)
    audit = outcome(np.where(inside, 20.0, 0.0), inside, TOY)
    assert (audit.cases, audit.guesses, audit.correct) == (100, 10, 10)
    assert (audit.calls.false_positives, audit.calls.false_negatives) == (0, 0)
    assert Audit.from_json(json.loads(json.dumps(audit.to_json()))) == audit
    reversed_ = outcome(np.where(inside, 0.0, 20.0), inside, TOY)
    assert reversed_.correct == 0
    assert reversed_.p_value() == 1


def test_the_coins_are_the_keys() -> None:
    one, other = (Canaries.drawn(NoiseStream(key=bytes([k]) * 32), scores=[], number=500).inside for k in (1, 2))
    assert not np.array_equal(one, other)
