"""Three hospitals in one process, from nothing to a generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpsynth.checks.run import check
from dpsynth.errors import ArtifactError
from dpsynth.generate import generate
from dpsynth.model.generator import Generator
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.progress import silent
from federated.simulate import InProcess, coordinator_of, run_study


def test_three_sites_train_a_generator_together(new_world: Callable[..., object], tmp_path: Path) -> None:
    world = new_world("a", "b", "c")
    transport = InProcess({name: site.guard.handle for name, site in world.sites.items()})
    coordinator = coordinator_of(world.federation, private=world.private, transport=transport, folder=tmp_path / "study")
    guarantee = run_study(coordinator, run_path=tmp_path / "run")
    for site in world.sites.values():
        assert len(site.guard.ledger.charges()) == 3
        assert all(charge.settled for charge in site.guard.ledger.charges())
        assert epsilon_pld(site.guard.ledger.charged_mechanisms(), 1e-5) == pytest.approx(guarantee.epsilon, rel=1e-6)
    assert 9 < guarantee.epsilon <= 10
    assert generate(tmp_path / "run", progress=silent).count == 500
    generator = Generator.load(tmp_path / "run" / "train")
    counted = replace(generator, gains=None).with_released_detail(world.federation.config.generate, progress=silent)
    np.testing.assert_array_equal(generator.gains, counted.gains)
    with pytest.raises(ArtifactError, match="do not take such a run"):
        check(tmp_path / "run", ledger_path=None, progress=silent)
