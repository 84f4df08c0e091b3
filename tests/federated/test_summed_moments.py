"""The moments of several sites are those of one with all of their patients, but for the noise, which is that of one times sqrt(sites)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from federation_cases import Hospital, World, initial, study

from dpsynth.model.moment_release import QUERIES, release_moments
from dpsynth.model.noised_sums import NoisedSums
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.mechanism import GaussianQuery, MomentRelease, merged
from dpsynth.privacy.noise import NoiseStream
from dpsynth.train.monitor import MomentMonitor
from federated.messages import Code, decode_request, encode_refusal


@pytest.fixture
def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mechanisms stay, and with them how far what is released leans on public images."""
    monkeypatch.setattr(NoisedSums, "_normal", lambda _, name, size: np.zeros(size))
    monkeypatch.setattr(MomentMonitor, "findings", lambda _: {})


@pytest.mark.usefixtures("without_noise")
def test_sites_together_tell_what_one_site_with_all_patients_and_more_noise_tells(new_world: Callable[..., World], tmp_path: Path) -> None:
    world = new_world("a", "b", "c")
    handlers = {name: site.guard.handle for name, site in world.sites.items()}
    state = study(world, handlers, tmp_path / "study", rounds=0).run(initial(world))
    parts = []
    for site in world.sites.values():
        known = site.guard.journal.known("study")
        assert known is not None
        parts.append(known[0].split(site.guard.images, site.policy.data, cells="", booked=True).training)
    offsets = np.cumsum([0, *(part.num_patients for part in parts)])
    release = world.model.release(world.plan)
    pooled = release_moments(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.patients + offset for part, offset in zip(parts, offsets[:-1], strict=True)]),
        num_classes=2,
        mechanism=replace(release, noise_multiplier=release.noise_multiplier * 3**0.5),
        reference=world.model.reference,
        stream=NoiseStream(key=bytes(32)),
    )
    together = world.model.moments(state.arrays)
    for name, array in pooled.to_arrays().items():
        np.testing.assert_allclose(together.to_arrays()[name], array, rtol=1e-9, atol=1e-12, err_msg=name)
    alone = study(world, {"a": Hospital(world, 0)}, tmp_path / "alone", sites=("a",), quorum=1, rounds=0).run(initial(world))
    assert not np.allclose(world.model.moments(alone.arrays).mean, together.mean), "the test would pass whatever came back"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_site_that_fails_after_the_first_query_takes_its_counts_with_it(empty: World, tmp_path: Path, number: int) -> None:
    """Three hospitals with the same patients: without one of them the others tell nearly the same, and no two thirds of it."""
    honest = {name: Hospital(empty, seed) for seed, name in enumerate("abc")}

    def closed(raw: bytes) -> bytes:
        signed = decode_request(raw, coordinators=(empty.private.public_key(),), largest_bytes=len(raw))
        return encode_refusal(Code.HOURS, request_sha256=signed.digest) if signed.request.round >= number else honest["c"](raw)

    whole = study(empty, honest, tmp_path / "whole", rounds=0).run(initial(empty))
    fewer = study(empty, {**honest, "c": closed}, tmp_path / "fewer", rounds=0).run(initial(empty))
    all_three, two = (empty.model.moments(state.arrays) for state in (whole, fewer))
    np.testing.assert_array_equal(two.counts, all_three.counts)
    np.testing.assert_array_equal(two.mean, all_three.mean)
    for name in ("variance", "covariance"):
        ours, theirs = (np.sum(getattr(moments, name) ** 2) ** 0.5 for moments in (two, all_three))
        assert ours == pytest.approx(theirs, rel=0.1), name


def test_queries_one_by_one_cost_what_the_release_of_all_costs(empty: World) -> None:
    release = empty.model.release(empty.plan)
    apart = [release.alone(query) for query in QUERIES]
    for part, query in zip(apart, QUERIES, strict=True):
        assert part.noise_stddev(query) == release.noise_stddev(query)
    assert epsilon_pld(apart, 1e-5) == pytest.approx(epsilon_pld([release], 1e-5), rel=1e-6)
    (joined,) = merged(apart)
    assert isinstance(joined, MomentRelease)
    assert joined.noise_multiplier == pytest.approx(release.noise_multiplier, rel=1e-12)
    for ours, theirs in zip(joined.queries, release.queries, strict=True):
        assert (ours.name, ours.clip_norm) == (theirs.name, theirs.clip_norm)
        assert ours.share == pytest.approx(theirs.share, rel=1e-12)


def test_releases_are_joined_only_while_their_queries_have_different_names() -> None:
    def one(name: str, noise: float) -> MomentRelease:
        return MomentRelease(noise_multiplier=noise, queries=(GaussianQuery(name=name, share=1.0, clip_norm=2.0),))

    twice = [one("a", 2.0), one("b", 3.0), one("a", 2.0), one("b", 5.0)]
    first, second = merged(twice)
    assert [query.name for query in first.queries] == [query.name for query in second.queries] == ["a", "b"]
    assert first.noise_multiplier == pytest.approx((2.0**-2 + 3.0**-2) ** -0.5)
    assert second.query_noise_multiplier("b") == pytest.approx(5.0)
    assert epsilon_pld(twice, 1e-5) == pytest.approx(epsilon_pld([first, second], 1e-5), rel=1e-9)
    assert merged([one("a", 2.0)]) == (one("a", 2.0),)
