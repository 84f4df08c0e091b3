"""Three hospitals in one process, from nothing to a generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import indent

import federation_cases
import numpy as np
import pytest
from federation_cases import CONFIG, World, new_site
from pydantic import ValidationError

from dpsynth.checks.accounting import ALWAYS
from dpsynth.checks.run import check
from dpsynth.errors import ArtifactError, UsageError
from dpsynth.generate import generate
from dpsynth.model.generator import Generator
from dpsynth.model.moment_release import count_stddev
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.mechanism import MomentRelease
from dpsynth.progress import silent
from dpsynth.release.run import refuse, report
from dpsynth.signing import generate_key, load_private
from federated.candidates import pack, unpack
from federated.federation import Federation, load_federation
from federated.messages import FIRST_TRAINING, Plan
from federated.price import describe, price_of
from federated.progress_view import progress_of
from federated.proofs import proofs_of
from federated.simulate import InProcess, coordinator_of, run_study


def test_three_sites_train_a_generator_together(new_world: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise: list[float] = []
    made = Generator.of
    monkeypatch.setattr(
        Generator,
        "of",
        lambda *given, count_stddev, **named: noise.append(count_stddev) or made(*given, count_stddev=count_stddev, **named),
    )
    world = new_world("a", "b", "c")
    transport = InProcess({name: site.guard.handle for name, site in world.sites.items()})
    coordinator = coordinator_of(world.federation, private=world.private, transport=transport, folder=tmp_path / "study")
    guarantee = run_study(coordinator, run_path=tmp_path / "run")
    for site in world.sites.values():
        assert len(site.guard.ledger.charges()) == FIRST_TRAINING + 2
        assert all(charge.settled for charge in site.guard.ledger.charges())
        assert epsilon_pld(site.guard.ledger.charged_mechanisms(), 1e-5) == pytest.approx(guarantee.epsilon, rel=1e-6)
    assert 9 < guarantee.epsilon <= 10
    assert generate(tmp_path / "run", progress=silent).count == 500
    generator = Generator.load(tmp_path / "run" / "train")
    of_one = count_stddev(world.model.release(world.plan), world.model.reference)
    assert noise == pytest.approx([of_one * 3**0.5]), "small cells are named by the noise of all three sites"
    counted = replace(generator, gains=None).with_released_detail(world.federation.config.generate, progress=silent)
    np.testing.assert_array_equal(generator.gains, counted.gains)
    for verb in (
        lambda run: check(run, ledger_path=None, progress=silent),
        lambda run: report(run, ledger_path=None),
        lambda run: refuse(run, ledger_path=None, who="W", why="w"),
    ):
        with pytest.raises(ArtifactError, match=r"do not take such a run\. Next: dpsynth-federation candidates"):
            verb(tmp_path / "run")
    shown = progress_of(tmp_path / "study")
    assert (shown["finished"], shown["run"], shown["waits_for"]) == (True, str(tmp_path / "run"), None)
    for site in shown["sites"].values():
        assert site["study_epsilon"] == pytest.approx(guarantee.epsilon, rel=1e-6)
        assert site["ledger_epsilon"] == pytest.approx(guarantee.epsilon, rel=1e-6)


def test_a_study_that_can_afford_no_training_spends_everything_on_the_moments(new_world: Callable[..., object], tmp_path: Path) -> None:
    """By the recipe, as one site would: so few patients at so small an epsilon train nothing."""
    world = new_world("a", "b")
    path = tmp_path / "study.yaml"
    text = CONFIG.replace("epsilon: 10", "epsilon: 1").replace("trainable: all, ", "")
    path.write_text(f"study: small\nsites: [a, b]\nquorum: 2\nsteps_per_round: 2\nconfig:\n{indent(text, '  ')}")
    transport = InProcess({name: site.guard.handle for name, site in world.sites.items()})
    coordinator = coordinator_of(load_federation(path), private=world.private, transport=transport, folder=tmp_path / "study")
    assert (coordinator.plan.trainable, coordinator.plan.rounds, coordinator.plan.noise_multiplier) == ("none", 0, None)
    guarantee = run_study(coordinator, run_path=tmp_path / "run")
    assert 0.98 < guarantee.epsilon <= 1
    (release,) = guarantee.mechanisms
    assert isinstance(release, MomentRelease)
    for site in world.sites.values():
        charges = site.guard.ledger.charges()
        assert len(charges) == FIRST_TRAINING
        assert site.guard.ledger.spent() == pytest.approx(guarantee.epsilon, rel=1e-6)
        known = site.guard.journal.known("small")
        assert known is not None
        proofs = proofs_of(known[0], list(enumerate(charges)), largest_bytes=1 << 30)
        assert (set(proofs.selfcheck), proofs.canaries, proofs.uses_sgd) == ({*ALWAYS}, {}, False)
    assert generate(tmp_path / "run", progress=silent).count == 500
    assert describe(price_of(coordinator.federation))[2].endswith("1.41 times as much.")


def test_sites_teach_the_coarse_image_and_the_coordinator_enlarges_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation_cases, "POLICY", federation_cases.POLICY.replace("[12, 12]", "[56, 64]"))
    private_path, public_path = generate_key(tmp_path / "keys")
    private, key = load_private(private_path), public_path.read_bytes()
    sites = {name: new_site(tmp_path / name, name=name, seed=seed, public_key=key) for seed, name in enumerate(("a", "b"))}
    text = CONFIG.replace("epsilon: 10", "epsilon: 1").replace("trainable: all, ", "").replace("[12, 12]", "[56, 64]")
    path = tmp_path / "study.yaml"
    path.write_text(f"study: large\nsites: [a, b]\nquorum: 2\nsteps_per_round: 2\nconfig:\n{indent(text, '  ')}  generate: {{count: 6}}\n")
    transport = InProcess({name: site.guard.handle for name, site in sites.items()})
    coordinator = coordinator_of(load_federation(path), private=private, transport=transport, folder=tmp_path / "study")
    assert coordinator.model.reference.shape == (1, 28, 32)
    assert {site.guard.images.images.shape[1:] for site in sites.values()} == {(1, 28, 32)}
    guarantee = run_study(coordinator, run_path=tmp_path / "run")
    assert "detail finer than [28, 32], from public images" in guarantee.unprotected
    assert len(list((tmp_path / "study" / "pretrained").glob("enlarger-*"))) == 1, "a study that goes on finds it again"
    assert generate(tmp_path / "run", progress=silent).count == 6
    pack(tmp_path / "run", out=tmp_path / "candidates.zip", private=private)
    policy = sites["a"].policy
    carried = unpack(tmp_path / "candidates.zip", coordinators=[private.public_key()], data=policy.data, largest_bytes=1 << 30)
    assert (carried.candidates.images.shape, carried.moments.shape) == ((6, 1, 56, 64), (1, 28, 32))
    other = policy.data.model_copy(update={"spatial_shape": (28, 32)})  # whose moments would fit and whose images are smaller
    with pytest.raises(UsageError, match=r"expected 8-bit images of shape \(1, 28, 32\)"):
        unpack(tmp_path / "candidates.zip", coordinators=[private.public_key()], data=other, largest_bytes=1 << 30)


def test_rounds_and_what_they_train_are_there_together_or_not_at_all(world: World) -> None:
    federation = world.federation.model_dump()
    with pytest.raises(ValidationError, match="rounds must be 0"):
        Federation.model_validate({**federation, "rounds": 0})
    for changes in ({"rounds": 0}, {"noise_multiplier": None}, {"trainable": "none"}, {"rounds": 0, "trainable": "none"}):
        with pytest.raises(ValidationError, match="together or not at all"):
            Plan.model_validate({**world.plan.model_dump(), **changes})
