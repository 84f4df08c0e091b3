"""Votes for candidates: what one patient can change, what noise is added, and that the winners are what patients look like."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpsynth.config import parse_config
from dpsynth.model import votes as module
from dpsynth.model.thumbnails import thumbnails
from dpsynth.model.votes import Parents, count_votes, num_candidates, release_votes
from dpsynth.plan import VOTES, planned_mechanisms
from dpsynth.privacy.mechanism import GaussianQuery, MomentRelease
from dpsynth.privacy.noise import NoiseStream

RNG = np.random.default_rng(0)
CANDIDATES = RNG.uniform(-1, 1, (12, 1, 8, 8)).astype(np.float32)
CELLS = np.arange(12) % 3
OTHERS = RNG.uniform(-1, 1, (30, 1, 8, 8)).astype(np.float32)


def booked(stddev: float) -> MomentRelease:
    """A release whose votes have noise of this standard deviation."""
    queries = (GaussianQuery(name="means", share=0.75, clip_norm=3.0), replace(VOTES, share=0.25))
    return MomentRelease(noise_multiplier=stddev / 2, queries=queries)


one_patient = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["near", "far", "huge", "nan", "black"])), min_size=1, max_size=9)


def picture(kind: str, index: int) -> np.ndarray:
    made = {"near": CANDIDATES[index], "far": -CANDIDATES[index], "huge": 1e6 * CANDIDATES[index], "black": np.full((1, 8, 8), -1.0)}
    return np.asarray({**made, "nan": np.full((1, 8, 8), np.nan)}[kind], dtype=np.float32)


@settings(max_examples=60, deadline=None)
@given(one_patient)
def test_one_patient_changes_the_votes_by_at_most_one(images: list[tuple[int, str]]) -> None:
    extra = np.stack([picture(kind, index) for index, (_, kind) in enumerate(images)])
    cells = np.array([cell for cell, _ in images])
    without = count_votes(CANDIDATES, CELLS, OTHERS, np.arange(30) % 3, np.arange(30))
    both = np.concatenate([OTHERS, extra]), np.concatenate([np.arange(30) % 3, cells]), np.append(np.arange(30), np.full(len(extra), 30))
    change = count_votes(CANDIDATES, CELLS, *both) - without
    assert np.linalg.norm(change) <= 1 + 1e-9
    assert change.min() >= 0
    assert change.sum() == pytest.approx(1)


def test_that_oracle_sees_a_vote_for_each_image_instead_of_each_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded = count_votes

    def per_image(candidates: np.ndarray, candidate_cells: np.ndarray, images: np.ndarray, cells: np.ndarray, _: np.ndarray) -> np.ndarray:
        return bounded(candidates, candidate_cells, images, cells, np.arange(len(images)))

    monkeypatch.setitem(globals(), "count_votes", per_image)
    with pytest.raises(AssertionError):
        test_one_patient_changes_the_votes_by_at_most_one.hypothesis.inner_test([(0, "near"), (1, "near"), (2, "near")])


def test_each_image_votes_for_the_nearest_candidate_of_its_cell() -> None:
    images = CANDIDATES + 0.01 * RNG.normal(size=CANDIDATES.shape).astype(np.float32)
    assert np.array_equal(count_votes(CANDIDATES, CELLS, images, CELLS, np.arange(12)), np.ones(12))
    votes = count_votes(CANDIDATES, CELLS, images[:1], np.array([1]), np.array([0]))
    assert votes[CELLS != 1].sum() == 0
    theirs = thumbnails(CANDIDATES)
    distances = np.linalg.norm(theirs[CELLS == 1] - thumbnails(images[:1]), axis=1)
    assert votes[CELLS == 1].argmax() == distances.argmin()
    assert count_votes(CANDIDATES, np.zeros(12, dtype=int), images[:1], np.array([1]), np.array([0])).sum() == 0  # nobody to vote for


def noise_p(stddev: float, claimed: float) -> float:
    found = []
    for key in range(40):
        release_votes(
            CANDIDATES, CELLS, OTHERS, np.arange(30) % 3, np.arange(30), mechanism=booked(stddev),
            stream=NoiseStream(key=bytes([key]) * 32), record=lambda name, exact, noised: found.append((name, noised - exact)),
        )  # fmt: skip
    assert {name for name, _ in found} == {VOTES.name}
    noise = np.concatenate([row for _, row in found]).ravel() / claimed
    assert len(np.unique(noise)) == len(noise)
    return float(2 * min(stats.chi2.cdf(noise @ noise, len(noise)), stats.chi2.sf(noise @ noise, len(noise))))


def test_the_noise_has_the_booked_scale_and_other_scales_are_rejected() -> None:
    assert noise_p(2.0, 2.0) > 1e-4
    for wrong in (1.0, 1.6, 2.5):
        assert noise_p(wrong, 2.0) < 1e-4


def test_other_candidates_get_other_noise_and_the_same_ones_the_same() -> None:
    def noise(candidates: np.ndarray) -> np.ndarray:
        found: list[np.ndarray] = []
        release_votes(
            candidates, CELLS, OTHERS, np.arange(30) % 3, np.arange(30), mechanism=booked(1.0), stream=NoiseStream(key=b"k" * 32),
            record=lambda _, exact, noised: found.append(noised - exact),
        )  # fmt: skip
        return found[0][0]

    nudged = CANDIDATES.copy()
    nudged[0, 0, 0, 0] = np.nextafter(nudged[0, 0, 0, 0], np.float32(2))
    assert np.allclose(noise(CANDIDATES), noise(CANDIDATES.copy()), atol=1e-12)
    assert np.abs(noise(CANDIDATES) - noise(nudged)).min() > 1e-6


def test_parents_are_made_from_noised_votes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cohorts with other votes and the same noised votes give the same parents: nothing else of the images gets through."""

    class Compensating(NoiseStream):
        def normal(self, purpose: str, step: int, size: int) -> np.ndarray:
            return (np.arange(size, dtype=float) - exact) / 1.5  # the noised votes are 0, 1, 2, ... whatever the exact ones are

    made = []
    for images, exact in ((OTHERS, np.zeros(12)), (-OTHERS, np.arange(12.0)[::-1])):
        monkeypatch.setattr(module, "count_votes", lambda *_, _exact=exact: _exact)
        made.append(
            release_votes(
                CANDIDATES, CELLS, images, np.arange(30) % 3, np.arange(30), mechanism=booked(1.5), stream=Compensating(key=b"v" * 32),
                record=lambda *_: None,
            )
        )  # fmt: skip
    assert all(np.array_equal(made[0].__dict__[name], made[1].__dict__[name]) for name in ("images", "cells", "weights"))
    assert np.ptp(made[0].weights) > 0


def test_another_clip_norm_than_that_of_one_vote_is_refused() -> None:
    release = MomentRelease(noise_multiplier=1.0, queries=(replace(VOTES, clip_norm=0.1),))
    with pytest.raises(ValueError, match="not the booked one"):
        release_votes(
            CANDIDATES, CELLS, OTHERS, np.arange(30) % 3, np.arange(30), mechanism=release, stream=NoiseStream(key=b"v" * 32),
            record=lambda *_: None,
        )  # fmt: skip


def test_one_vote_is_what_a_patient_has() -> None:
    """The booked norm is the largest change that any patient makes, and no smaller."""
    changes = [
        count_votes(CANDIDATES, CELLS, CANDIDATES[rows], CELLS[rows], np.zeros(len(rows), dtype=int)) for rows in ([0], [0, 1], [0, 0, 5])
    ]
    assert max(np.linalg.norm(change) for change in changes) == pytest.approx(VOTES.clip_norm)
    (release, _) = planned_mechanisms(parse_config("votes: {share: 0.05}\ndata: {declared_patients: 4000}", base=Path.cwd()), delta=1e-6)
    assert isinstance(release, MomentRelease)
    assert release.query(VOTES.name).clip_norm == VOTES.clip_norm
    assert release.noise_stddev(VOTES.name) == pytest.approx(release.noise_multiplier / np.sqrt(release.query(VOTES.name).share))


def test_winners_look_like_the_patients() -> None:
    ramp = np.broadcast_to(np.linspace(-1, 1, 8), (1, 8, 8))
    kinds = np.stack([ramp, ramp.transpose(0, 2, 1)])
    which = np.arange(200) % 2
    candidates = (kinds[which] + 0.3 * RNG.normal(size=(200, 1, 8, 8))).astype(np.float32)
    patients = (kinds[np.zeros(800, dtype=int)] + 0.3 * RNG.normal(size=(800, 1, 8, 8))).astype(np.float32)
    nobody = np.zeros(200, dtype=int)

    def share(stddev: float) -> float:
        parents = release_votes(
            candidates, nobody, patients, np.zeros(800, dtype=int), np.arange(800), mechanism=booked(stddev),
            stream=NoiseStream(key=b"w" * 32), record=lambda *_: None,
        )  # fmt: skip
        first = np.abs(parents.images - kinds[0]).mean((1, 2, 3))
        second = np.abs(parents.images - kinds[1]).mean((1, 2, 3))
        return float(parents.weights[first < second].sum() / parents.weights.sum())

    assert share(1.0) > 0.9
    assert share(1e4) < 0.7  # noise alone elects anyone


def test_noise_in_the_votes_is_not_taken_for_votes() -> None:
    rng = np.random.default_rng(0)
    truth = rng.poisson(rng.gamma(0.5, 4.0, 3000)).astype(float)
    for stddev in (3.0, 8.0):
        noised = truth + stddev * rng.normal(size=3000)
        expected, raw = module._expected_votes(noised, stddev), np.maximum(noised, 0)
        assert ((expected - truth) ** 2).mean() < ((raw - truth) ** 2).mean()
        assert expected.mean() == pytest.approx(truth.mean(), rel=0.2)
    assert np.ptp(module._expected_votes(100.0 + rng.normal(size=3000), 2.0)) == 0  # less than the noise explains: all alike


def test_a_cell_without_a_winner_keeps_all_its_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "count_votes", lambda *_: np.where(CELLS == 2, -1e6, 1e6))
    parents = release_votes(
        CANDIDATES, CELLS, OTHERS, np.arange(30) % 3, np.arange(30), mechanism=booked(1.0), stream=NoiseStream(key=b"v" * 32),
        record=lambda *_: None,
    )  # fmt: skip
    assert (parents.cells == 2).sum() == 4
    assert parents.weights.min() > 0


def test_parents_are_chosen_by_weight_from_the_seed_alone() -> None:
    parents = Parents(images=CANDIDATES[:4], cells=np.array([0, 0, 1, 1]), weights=np.array([1.0, 3.0, 0.5, 0.5]))
    cells, seeds = np.arange(6000) % 3, np.arange(6000, dtype=np.uint64)
    chosen = parents.choose(cells, seeds)
    assert (chosen[cells == 2] == -1).all()
    assert np.array_equal(np.unique(chosen[cells == 0]), [0, 1])
    assert np.mean(chosen[cells == 0] == 1) == pytest.approx(0.75, abs=0.03)
    assert np.array_equal(parents.choose(cells[100:200], seeds[100:200]), chosen[100:200])


def test_the_number_of_candidates_follows_from_public_numbers() -> None:
    counts = [num_candidates(booked(stddev), declared_patients=4000, num_cells=2) for stddev in (1.0, 5.0, 50.0, 5000.0)]
    assert counts == [2000, 1600, 160, 40]
