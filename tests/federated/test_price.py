"""Local noise at K sites beside pooled noise under one guard: by closed forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy.optimize import brentq

from dpsynth.privacy.calibrate import gaussian_delta
from dpsynth.privacy.mechanism import GaussianQuery, MomentRelease, PoissonDpSgd
from federated import coordinator_cli
from federated.demonstration import STUDY
from federated.price import Price, price

DELTA = 1e-5
RELEASE = MomentRelease(noise_multiplier=2.0, queries=(GaussianQuery(name="x", share=1.0, clip_norm=1.0),))


def of_gaussians(sites: int) -> Price:
    """Every patient in every step: all mechanisms are Gaussian, and together they are one of mu^2 = 1/2^2 + 20/8^2."""
    sgd = PoissonDpSgd(noise_multiplier=8.0, clip_norm=0.05, sampling_probability=1.0, steps=20, declared_patients=500)
    return price(RELEASE, sgd, sites=sites, patients=1000, delta=DELTA)


def exact(mu: float) -> float:
    """Epsilon of one Gaussian mechanism (Balle and Wang 2018)."""
    return float(brentq(lambda epsilon: gaussian_delta(epsilon, 1 / mu) - DELTA, 1e-6, 200))


@pytest.mark.parametrize("sites", [1, 3])
def test_the_price_is_that_of_the_gaussians(sites: int) -> None:
    found, mu = of_gaussians(sites), (1 / 2.0**2 + 20 / 8.0**2) ** 0.5
    assert found.epsilon == pytest.approx(exact(mu), rel=5e-3)
    assert found.epsilon_at_all_sites == pytest.approx(exact(mu * sites**0.5), rel=5e-3)
    assert found.pooled_epsilon_for_local_noise == pytest.approx(exact(mu / sites**0.5), rel=5e-3)
    assert found.local_epsilon_for_pooled_noise == pytest.approx(exact(mu * sites**0.5), rel=5e-3)
    assert found.pooled_noise == pytest.approx(8.0 / 1000)
    assert found.local_noise / found.pooled_noise == pytest.approx(sites**0.5)


def test_the_noise_of_the_mean_over_sites_is_what_their_mechanisms_add() -> None:
    """Each of 4 sites has 250 patients: its noise is 8 / 250, and the mean of four such is half of that."""
    assert of_gaussians(4).local_noise == pytest.approx(8.0 / 250 / 2)


def test_one_site_pays_nothing_and_more_sites_pay_more() -> None:
    one = of_gaussians(1)
    assert one.epsilon == one.pooled_epsilon_for_local_noise == one.local_epsilon_for_pooled_noise == one.epsilon_at_all_sites
    prices = [of_gaussians(sites).local_epsilon_for_pooled_noise for sites in (1, 3, 4)]
    assert prices == sorted(prices)
    assert prices[-1] > 2 * prices[0]


def test_the_command_prices_a_study_and_asks_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    with pytest.raises(SystemExit) as left:
        coordinator_cli.app(["price", str(path), "--format", "json"])
    assert not left.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["sites"] == 3
    assert 9 < found["epsilon"] <= 9.9
    assert found["local_noise"] / found["pooled_noise"] == pytest.approx(3**0.5)
    assert found["pooled_epsilon_for_local_noise"] < found["epsilon"] < found["local_epsilon_for_pooled_noise"]
    with pytest.raises(SystemExit):
        coordinator_cli.app(["price", str(path)])
    assert "1.73 times as much" in capsys.readouterr().out
