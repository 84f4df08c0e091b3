"""The recipe: what DP-SGD trains follows from public numbers, in the right order, and what a user writes stands above it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsynth.config import Config, dump_config, parse_config, resolved
from dpsynth.model.denoiser import Denoiser
from dpsynth.model.moments import Moments
from dpsynth.plan import describe, plan, planned_mechanisms
from dpsynth.privacy.mechanism import MomentRelease, PoissonDpSgd
from dpsynth.recipe import _SMALL_PART, _WEIGHTS_PER_CHANNEL_PAIR, FULL, MOMENTS_AND_VOTES, PART, Recipe, recipe

ORDER = [MOMENTS_AND_VOTES, PART, FULL]


def chosen(patients: float, epsilon: float, channels: tuple[int, ...] = (32, 64)) -> Recipe:
    return recipe(patients=patients, epsilon=epsilon, delta=1e-6, channels=channels, dimensions=2, votes_share=0.05)


@settings(max_examples=60, deadline=None)
@given(st.floats(50, 1e5), st.floats(0.2, 20), st.floats(1, 10))
def test_more_patients_more_epsilon_and_fewer_weights_never_train_less(patients: float, epsilon: float, factor: float) -> None:
    now = ORDER.index(chosen(patients, epsilon))
    assert ORDER.index(chosen(patients * factor, epsilon)) >= now
    assert ORDER.index(chosen(patients, epsilon * factor)) >= now
    assert ORDER.index(chosen(patients, epsilon, (16, 32))) >= now


def test_a_hospital_of_thousands_trains_all_at_epsilon_10_and_one_of_hundreds_nothing_at_1() -> None:
    assert chosen(4700, 10) == FULL
    assert chosen(4700, 1) == PART
    assert chosen(300, 1) == MOMENTS_AND_VOTES


def test_the_estimate_of_the_weights_is_near_the_truth() -> None:
    import numpy as np

    for channels in ((16, 32), (32, 64)):
        moments = Moments(
            shape=(1, 28, 28), low_frequencies=4, counts=np.ones(2), mean=np.zeros((2, 16)), covariance=np.stack([np.eye(16)] * 2),
            variance=np.ones((2, 784)),
        )  # fmt: skip
        denoiser = Denoiser(moments, channels=channels)
        everything = sum(parameter.numel() for parameter in denoiser.net.parameters())
        assert _WEIGHTS_PER_CHANNEL_PAIR * sum(c * c for c in channels) == pytest.approx(everything, rel=0.15)
        denoiser.set_trainable("small")
        small = sum(parameter.numel() for parameter in denoiser.net.parameters() if parameter.requires_grad)
        assert small / everything == pytest.approx(_SMALL_PART, rel=1.0)


def configuration(text: str = "", patients: int = 4700, epsilon: float = 10) -> Config:
    return parse_config(f"data: {{declared_patients: {patients}}}\nprivacy: {{epsilon: {epsilon}}}\n{text}", base=Path.cwd())


def test_a_configuration_is_filled_in_once_and_says_so() -> None:
    config = configuration()
    assert (config.diffusion.trainable, config.diffusion.steps, config.moments.share) == ("all", FULL.steps, FULL.moments_share)
    assert (config.diffusion.draws, configuration("diffusion: {draws: 3}").diffusion.draws) == (FULL.draws, 3)
    assert configuration(epsilon=1).diffusion.draws == PART.draws != FULL.draws
    assert resolved(config) == config
    assert parse_config(dump_config(config), base=Path.cwd()) == config


@pytest.mark.parametrize(
    ("text", "steps", "share"), [("diffusion: {steps: 7}", 7, FULL.moments_share), ("moments: {share: 0.3}", FULL.steps, 0.3)]
)
def test_what_is_given_stands_above_the_recipe(text: str, steps: int, share: float) -> None:
    config = configuration(text)
    assert (config.diffusion.trainable, config.diffusion.steps, config.moments.share) == ("all", steps, share)


def test_a_step_of_a_large_hospital_takes_no_more_patients_than_it_needs() -> None:
    assert configuration(patients=4700).diffusion.sampling_probability == 0.1
    assert configuration(patients=50_000).diffusion.sampling_probability == pytest.approx(1000 / 50_000)
    assert configuration("diffusion: {sampling_probability: 0.05}", patients=50_000).diffusion.sampling_probability == 0.05
    steps = [
        mechanism for mechanism in planned_mechanisms(configuration(patients=50_000), delta=1e-6) if isinstance(mechanism, PoissonDpSgd)
    ]
    assert [step.expected_batch_size for step in steps] == [pytest.approx(1000)]


def test_without_dp_sgd_everything_goes_to_moments_and_votes() -> None:
    config = configuration(patients=300, epsilon=1)
    (release,) = planned_mechanisms(config, delta=1e-6)
    assert isinstance(release, MomentRelease)
    assert plan(config).epsilon_pld == pytest.approx(1, abs=0.01)
    assert plan(config).trainable == "none"


def test_the_plan_says_what_is_trained() -> None:
    rows = dict(describe(plan(configuration())))
    assert rows["trained with privacy"] == "all weights"
    assert any(isinstance(m, PoissonDpSgd) for m in plan(configuration()).mechanisms)
