"""Faults of DP-SGD that the canaries must name, on the code that trains; and the sound engine, which they must not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from evidence_cases import evidence_of
from torch import Tensor

from dpsynth.checks.family import decide_family
from dpsynth.checks.mechanism import mechanism
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import GateConfig
from dpsynth.errors import SelfCheckFailed
from dpsynth.privacy.audit import BEFORE, DURING, Audit
from dpsynth.privacy.mechanism import PoissonDpSgd
from dpsynth.privacy.noise import NoiseStream
from dpsynth.train.canaries import TOY, require_audit, start_up_audit
from dpsynth.train.dpsgd import ENGINE, Engine, private_mean
from dpsynth.train.gradients import clipped_sum

GATE = GateConfig()


def half_noise(total: Tensor, *, mechanism: PoissonDpSgd, stream: NoiseStream, step: int) -> Tensor:
    full = private_mean(total, mechanism=mechanism, stream=stream, step=step)
    return (full + total.double() / mechanism.expected_batch_size) / 2


def no_noise(total: Tensor, *, mechanism: PoissonDpSgd, stream: NoiseStream, step: int) -> Tensor:
    return total.double() / mechanism.expected_batch_size


def no_clip(gradients: list[Tensor], *, clip_norm: float) -> tuple[Tensor, Tensor]:
    flat = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
    return flat.sum(0), flat.norm(dim=1).clamp(max=clip_norm)  # and it lies about the norms


def noise_by_chunk() -> Engine:
    """Each chunk brings a part of the noise instead of each step all of it: the parts add up to less."""
    rng = np.random.default_rng(0)

    def clip(gradients: list[Tensor], *, clip_norm: float) -> tuple[Tensor, Tensor]:
        total, norms = clipped_sum(gradients, clip_norm=clip_norm)
        parts = 8
        return total + torch.from_numpy(rng.normal(0, TOY.noise_stddev / parts, len(total))).float(), norms

    return replace(ENGINE, clip=clip, noise=no_noise)


FAULTS: dict[str, Callable[[], Engine]] = {
    "noise halved": lambda: replace(ENGINE, noise=half_noise),
    "no noise": lambda: replace(ENGINE, noise=no_noise),
    "clipping off": lambda: replace(ENGINE, clip=no_clip),
    "noise by chunk": noise_by_chunk,
}


@cache
def sound_audit() -> Audit:
    return start_up_audit(key=b"s" * 32)


def judged(engine: Engine, key: int) -> Verdict:
    """The verdict of a run whose canaries before training went through `engine`, those during training through the sound one."""
    audits = {BEFORE: start_up_audit(engine=engine, key=bytes([key]) * 32), DURING: sound_audit()}
    evidence = evidence_of(canaries={name: audit.to_json() for name, audit in audits.items()})
    return decide_family([mechanism(evidence, GATE)], GATE.family_error)[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_by_name(fault: str) -> None:
    verdict = judged(FAULTS[fault](), 1)
    assert verdict.outcome is Outcome.FAIL, verdict.reason
    assert "canaries give away more" in verdict.reason


def test_the_sound_engine_passes_and_its_bound_is_below_the_claim() -> None:
    verdict = judged(ENGINE, 1)
    assert verdict.outcome is Outcome.PASS
    assert verdict.lower_bound is not None
    assert 0 < verdict.lower_bound < verdict.threshold


def test_a_gross_fault_stops_training_before_anything_is_charged() -> None:
    with pytest.raises(SelfCheckFailed, match="canaries"):
        require_audit(start_up_audit(engine=replace(ENGINE, noise=no_noise), key=b"k" * 32))


def test_without_canaries_dp_sgd_is_inconclusive() -> None:
    found = mechanism(evidence_of(canaries={}), GATE)
    assert found.outcome is Outcome.INCONCLUSIVE
    assert BEFORE in found.reason
    assert mechanism(evidence_of(canaries={}, uses_sgd=False), GATE).outcome is Outcome.PASS


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FAULTS, None])
def test_twenty_keys(fault: str | None) -> None:
    """Of twenty runs each, half the noise and everything worse is failed in 18 or more; the sound engine in none."""
    failed = sum(judged(FAULTS[fault]() if fault else ENGINE, key).outcome is Outcome.FAIL for key in range(20))
    assert failed >= 18 if fault else failed == 0
