"""What the monitor of a run says of noise, sampling and contributions that are not what was booked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpsynth.privacy.mechanism import GaussianQuery, MomentRelease, PoissonDpSgd
from dpsynth.train.monitor import MomentMonitor, Monitor

RELEASE = MomentRelease(
    noise_multiplier=2.0,
    queries=(GaussianQuery(name="means", share=0.4, clip_norm=1.0), GaussianQuery(name="energies", share=0.6, clip_norm=3.0)),
)
SGD = PoissonDpSgd(noise_multiplier=2.0, clip_norm=0.5, sampling_probability=0.1, steps=40, declared_patients=900)
WIDTH, CLASSES = 400, 3


def moments_ok(spoil: str = "") -> bool:
    rng, monitor, kept = np.random.default_rng(0), MomentMonitor(mechanism=RELEASE), None
    for query in RELEASE.queries:
        noise = rng.normal(0, RELEASE.noise_stddev(query.name), (CLASSES, WIDTH))
        if spoil == "none in the last class":
            noise[-1] = 0
        if spoil == "half in the last class":
            noise[-1] /= 2
        if spoil == "one noise for two queries":
            standard = noise / RELEASE.noise_stddev(query.name)
            kept = standard if kept is None else kept
            noise = kept * RELEASE.noise_stddev(query.name)
        if spoil == "one noise for two classes":
            noise[1] = noise[0]
        total = rng.normal(size=(CLASSES, WIDTH))
        if spoil != "a query unseen" or query.name == "means":
            monitor.record(query.name, total, total + noise)
    return monitor.findings()["moments_noise"].ok


def test_moments_with_the_booked_noise_are_sound() -> None:
    assert moments_ok()


@pytest.mark.parametrize(
    "spoil",
    ["none in the last class", "half in the last class", "one noise for two queries", "one noise for two classes", "a query unseen"],
)
def test_noise_that_is_missing_or_used_twice_anywhere_is_named(spoil: str) -> None:
    assert not moments_ok(spoil)


def findings(*, drawn: float = 0.1, fixed: bool = False, contribution: float = 0.5, noise: float = 1.0) -> dict[str, bool]:
    rng, monitor = np.random.default_rng(0), Monitor()
    for _ in range(SGD.steps):
        size = 90 if fixed else int(rng.binomial(900, drawn))
        total = torch.from_numpy(rng.normal(size=500))
        mean = (total + torch.from_numpy(rng.normal(0, noise * SGD.noise_stddev, 500))) / SGD.expected_batch_size
        monitor.record(batch_size=size, contribution=contribution, total=total, mean=mean, mechanism=SGD)
    return {name: finding.ok for name, finding in monitor.findings(SGD, 900).items()}


def test_a_sound_run_is_said_to_be_one() -> None:
    assert all(findings().values())


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        ({"drawn": 0.05}, "live_sampler_poisson"),
        ({"drawn": 0.13}, "live_sampler_poisson"),
        ({"fixed": True}, "live_sampler_poisson"),
        ({"contribution": 0.51}, "live_contribution_bounded"),
        ({"noise": 0.9}, "live_noise_scale"),
        ({"noise": 0.0}, "live_noise_scale"),
    ],
)
def test_each_fault_is_named_and_no_other(spoil: dict[str, float], named: str) -> None:
    assert [name for name, ok in findings(**spoil).items() if not ok] == [named]
