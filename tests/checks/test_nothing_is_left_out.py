"""What a check must look at and ask for, where leaving it out would only make it weaker: an ordinary run does not show that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from evidence_cases import evidence_of, features_of, image_set
from scipy import stats
from test_decisions import GATE, Hospital, points

import dpsynth.checks.attributes as attributes_module
import dpsynth.checks.copying as copying_module
import dpsynth.checks.membership as membership_module
import dpsynth.checks.screening as screening_module
import dpsynth.checks.search as search_module
import dpsynth.checks.white_box as white_box_module
from dpsynth.checks import accounting, family
from dpsynth.checks.attributes import attributes
from dpsynth.checks.burned_text import letters_on_a_line, text_scores
from dpsynth.checks.copying import copies_needed, copying, usual_ratios
from dpsynth.checks.evidence import Evidence, Features
from dpsynth.checks.family import decide_family, needed, strictest
from dpsynth.checks.groups import groups
from dpsynth.checks.membership import membership, pool_scores
from dpsynth.checks.plausibility import Reference, deviations
from dpsynth.checks.screening import similarity_to_earlier
from dpsynth.checks.search import Approaches, approaches
from dpsynth.checks.statistics import smallest_detectable_auc
from dpsynth.checks.utility import difference_interval
from dpsynth.checks.verdict import Outcome
from dpsynth.config import GateConfig
from dpsynth.data.phantom import phantom_images
from dpsynth.model.moments import Moments, frequencies, to_frequencies
from dpsynth.privacy.lower_bounds import one_run_p_value
from dpsynth.progress import silent
from dpsynth.train.canaries import start_up_audit


def leaky(rng: np.random.Generator) -> tuple[Evidence, Features]:
    """A generator that draws blurred training patients."""
    hospital = Hospital.drawn(rng)
    synthetic = hospital.training[rng.integers(len(hospital.training), size=200)] + 0.3 * points(200, rng)
    return hospital.sets(), hospital.features(synthetic)


@pytest.mark.parametrize("only", ["encoder", "thumbnails"])
def test_a_leak_that_one_space_alone_shows_is_seen(only: str) -> None:
    rng = np.random.default_rng(0)
    sets, features = leaky(rng)
    noise = {
        name: rng.normal(size=getattr(features, name).shape)
        for name in ("synthetic", "training", "control", "synthetic_thumbnails", "training_thumbnails", "control_thumbnails")
        if name.endswith("thumbnails") == (only == "encoder")
    }
    scores = pool_scores(sets, replace(features, **noise))
    assert membership(sets, GATE, scores=lambda: scores, rng=rng).p_value < 1e-3


def test_the_bound_on_epsilon_is_of_all_patients_of_the_pool_at_the_claims_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(membership_module, "one_run_epsilon", lambda **given: asked.append(given) or 0.0)
    rng = np.random.default_rng(0)
    sets, features = leaky(rng)
    scores = pool_scores(sets, features)
    membership(sets, GATE, scores=lambda: scores, rng=rng)
    (given,) = asked
    assert (given["cases"], given["delta"]) == (len(sets.pool), sets.delta)
    assert given["guesses"] == round(len(sets.pool) / 10)


def test_what_would_have_been_seen_is_at_the_strictest_level_of_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    sets, features = leaky(rng)
    sides = int(sets.inside.sum()), int((~sets.inside).sum())
    found = membership(sets, GATE, scores=lambda: pool_scores(sets, features), rng=rng)
    assert found.figures["smallest detectable AUC"] == smallest_detectable_auc(*sides, false_alarm_rate=0.05 / 4)
    levels: list[float] = []

    def smallest(*_: int, false_alarm_rate: float) -> float:
        levels.append(false_alarm_rate)
        return 0.6

    monkeypatch.setattr(attributes_module, "smallest_detectable_auc", smallest)
    sexes = tuple({"sex": "FM"[row % 2]} for row in range(200))
    training, control = (image_set(np.zeros((n, 1, 4, 4)), np.arange(n) % 2, attributes=sexes[:n]) for n in (80, 80))
    whole = replace(
        evidence_of(training, control, np.zeros((100, 1, 4, 4)), np.arange(100) % 2),
        synthetic_attributes={"sex": np.array(["FM"[row % 3 % 2] for row in range(100)])},
    )
    attributes(whole, features_of(*(points(n, rng) for n in (100, 80, 80))), GATE, rng=rng)
    assert levels == pytest.approx([family.ALONE / 2])  # two secrets: label and sex


def test_many_groups_and_a_strict_policy_leave_enough_flips_to_accuse() -> None:
    """With 9,999 flips no p-value lies below 1e-4, and thirty groups times that is above a quarter of one per cent."""
    rng = np.random.default_rng(0)
    count = 600
    strict = GateConfig(family_error=0.01)
    attributes_ = tuple({f"a{number}": "xyzuvw"[int(rng.integers(6))] for number in range(6)} for _ in range(2 * count))
    sets = [image_set(np.zeros((count, 1, 4, 4)), np.zeros(count), attributes=attributes_[start : start + count]) for start in (0, count)]
    whole = evidence_of(*sets)
    scores = np.where(whole.inside, 1.0, 0.0) + rng.normal(size=2 * count)
    found = groups(whole, features_of(*(points(n, rng) for n in (50, count, count))), strict, scores=lambda: scores, rng=rng)
    assert len([name for name in found.figures if name.startswith("AUC, ")]) > 25
    (decided,) = (verdict for verdict in decide_family([found], strict.family_error))
    assert decided.outcome is Outcome.FLAG


def test_no_policy_can_do_without_these_checks_and_findings() -> None:
    assert set(needed(())) == {"accounting", "mechanism", "membership", "copying"}
    assert family.FAMILY == ("mechanism", "membership", "copying", "groups")
    assert family.ALONE == 0.01
    assert {*accounting.ALWAYS, *accounting.REQUIRED} == {
        "moments_noise", "all_parameters_covered", "buffers_unchanged", "contribution_bounded", "gradients_exact",
        "live_contribution_bounded", "live_noise_scale", "live_sampler_poisson", "noise_scale", "sampler_poisson",
    }  # fmt: skip


@pytest.mark.parametrize(("least", "outcome"), [(27, Outcome.INCONCLUSIVE), (28, Outcome.PASS)])
def test_copying_says_that_it_cannot_tell_below_four_times_what_it_needs(least: int, outcome: Outcome) -> None:
    """Seven distinct patients, all in training, have a probability of 2^-7 under fair coins, below a quarter of 5 %."""
    assert copies_needed(strictest(GATE)) == 7
    rng = np.random.default_rng(0)
    sets = [image_set(np.zeros((n, 1, 4, 4)), np.zeros(n), prefix=p) for n, p in ((least, "p"), (60, "c"))]
    number = np.arange(60 + least)
    real = Approaches(item=number, patient=number, ratio=np.full(len(number), 0.8), copy=np.full(len(number), 0.02), kind=0 * number)
    features = replace(features_of(points(1, rng), points(least, rng), points(60, rng)), real_approaches=real)
    far = Approaches(item=number[:1], patient=number[:1], ratio=np.array([0.9]), copy=np.full(1, 0.02), kind=number[:1])
    assert copying(evidence_of(*sets), replace(features, synthetic_approaches=far), GATE, rng=rng).outcome is outcome


def test_copies_count_up_to_the_usual_ratio_and_the_usual_is_that_of_one_in_a_hundred() -> None:
    assert copying_module._PARTS == (0.4, 0.6, 0.8, 1.0)
    rng = np.random.default_rng(0)
    number = np.arange(4000)
    real = Approaches(
        item=number, patient=number, ratio=0.5 * np.exp(0.2 * rng.normal(size=4000)), copy=np.full(4000, 0.02), kind=0 * number
    )
    assert usual_ratios(real)[0] == pytest.approx(0.5 * np.exp(0.2 * stats.norm.ppf(0.01)), rel=0.03)


@pytest.mark.parametrize("change", ["shifted", "turned"])
def test_a_copy_that_is_mirrored_and_moved_is_as_near_as_one_that_is_moved(change: str) -> None:
    images = phantom_images(anatomies=("chest",), num_images=30, spatial_shape=(32, 32), channels=1, num_classes=2, seed=3)[0]
    turn = torch.tensor([[np.cos(0.05), -np.sin(0.05), 0.0], [np.sin(0.05), np.cos(0.05), 0.0]]).float()
    grid = torch.nn.functional.affine_grid(turn.expand(8, -1, -1), [8, 1, 32, 32], align_corners=False)
    copies = torch.from_numpy(images[:8])
    moved = (
        torch.roll(copies, 2, dims=3)
        if change == "shifted"
        else torch.nn.functional.grid_sample(copies, grid, padding_mode="border", align_corners=False)
    )
    for flipped in (moved, moved.flip(3)):
        found = approaches(np.ascontiguousarray(flipped.numpy()), images, np.arange(30), progress=silent)
        ratios, patients = found.per_item(8)
        np.testing.assert_array_equal(patients, np.arange(8))
        assert (ratios < 0.5).all()


def test_of_images_that_differ_in_colour_alone_no_copy_could_be_told() -> None:
    """Thumbnails are grey: everybody is blank there, as far from each other as a stranger, and an exact copy is no nearer."""
    rng = np.random.default_rng(0)
    red = rng.uniform(-0.5, 0.5, (40, 1, 16, 16)).astype(np.float32)
    real = np.concatenate([red, -red, 0 * red], axis=1)
    found = approaches(real, real, np.arange(40), own=np.arange(40), progress=silent)
    assert copying_module.visible(found) == 0.0
    grey = np.repeat(red, 3, axis=1)
    assert copying_module.visible(approaches(grey, grey, np.arange(40), own=np.arange(40), progress=silent)) > 0.9


def test_the_mean_that_is_taken_off_is_of_all_patients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training patients come first: a mean of the first ones alone would depend on the coins."""
    rng = np.random.default_rng(5)
    real = rng.uniform(-1, 1, (30, 1, 12, 12)).astype(np.float32)
    real[:15, :, :4] += 0.5
    queries = rng.uniform(-1, 1, (6, 1, 12, 12)).astype(np.float32)
    whole = approaches(queries, real, np.arange(30), progress=silent)
    monkeypatch.setattr(search_module, "_ROWS_PER_MEAN", 7)
    np.testing.assert_allclose(approaches(queries, real, np.arange(30), progress=silent).ratio, whole.ratio, atol=1e-5)


def test_the_look_at_the_weights_is_at_all_levels_with_the_patients_own_labels_and_at_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    for dimensions, largest in ((2, 0.5), (3, 2.5)):
        assert white_box_module.noise_levels_of(dimensions) == pytest.approx(np.geomspace(0.05, largest, 8).tolist())
    asked: list[tuple[np.ndarray, np.ndarray]] = []

    def scored(_: object, images: np.ndarray, cells: np.ndarray, **__: object) -> np.ndarray:
        asked.append((images, cells))
        return np.random.default_rng(0).normal(size=len(images))

    class Layout:
        @staticmethod
        def index(labels: np.ndarray, _: object) -> np.ndarray:
            return labels

    monkeypatch.setattr(white_box_module, "loss_scores", scored)
    count = 2000
    labels = np.arange(count) % 2
    sides = [image_set(np.full((count, 1, 2, 2), value) + labels[:, None, None, None], labels) for value in (0.0, 10.0)]
    whole = replace(evidence_of(*sides), generator=type("G", (), {"cells": Layout, "enlargers": ()})())
    white_box_module.white_box(whole, GATE, rng=np.random.default_rng(0), progress=silent)
    ((images, cells),) = asked
    np.testing.assert_array_equal(images[:, 0, 0, 0] % 10, cells)
    assert len(cells) == white_box_module.MOST
    assert 0.4 < (images[:, 0, 0, 0] < 5).mean() < 0.6, "of those who were trained on and of the others alike"


def test_structure_is_held_against_the_images_own_cell() -> None:
    layout = frequencies((1, 8, 8), 3)
    low = len(layout.low)
    means = np.zeros((2, low))
    means[1, 0] = 8.0
    moments = Moments(
        shape=(1, 8, 8), low_frequencies=3, counts=np.ones(2), mean=means, covariance=np.repeat(np.eye(low)[None], 2, axis=0),
        variance=np.ones((2, 64)),
    )  # fmt: skip
    bright = np.full((2, 1, 8, 8), 1.0, dtype=np.float32)
    assert to_frequencies(bright)[0, layout.low[0]] == pytest.approx(8.0)
    structure, _ = deviations(bright, np.array([1, 0]), Reference.of(moments))
    assert structure[0] < 0.1 < 3 < structure[1]


def test_dark_print_and_print_in_any_slice_are_text() -> None:
    plane = np.zeros((64, 64), dtype=np.float32)
    for letter in range(6):
        plane[20:29, 8 + 8 * letter : 13 + 8 * letter] = 0.9
        plane[22:27, 10 + 8 * letter : 11 + 8 * letter] = 0.0
    bright = letters_on_a_line(plane)
    assert bright >= 5
    assert letters_on_a_line(-plane) == bright
    volume = np.zeros((1, 1, 8, 64, 64), dtype=np.float32)
    volume[0, 0, 5] = plane
    assert text_scores(volume, reader="strokes", task="x", progress=silent)[0] == bright


def test_doubles_are_found_however_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening_module, "_BLOCK", 7)
    images = np.random.default_rng(0).uniform(-1, 1, (30, 1, 16, 16)).astype(np.float32)
    images[29] = images[2]
    found = similarity_to_earlier(images, progress=silent)
    assert found[29] > 0.999
    assert found[:29].max() < 0.99


def test_the_interval_of_utility_is_as_wide_with_ten_images_of_each_patient_as_with_one() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    first, second = (np.stack([1 - p, p], axis=1) for p in (rng.normal(labels, 1.0), rng.normal(labels, 2.0)))
    widths = []
    for times in (1, 10):
        rows_of = [np.arange(times) + times * patient for patient in range(80)]
        given = [np.repeat(values, times, axis=0) for values in (first, second, labels)]
        low, high = difference_interval(*given, rows_of, np.random.default_rng(1), confidence_level=0.95)
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0], rel=0.15)


def test_the_bound_from_one_run_with_delta_is_theorem_5_2_term_by_term() -> None:
    for correct in (1, 12, 37):
        success = 1 / (1 + np.exp(-0.7))
        tail = sum(stats.binom.pmf(k, 40, success) for k in range(correct, 41))
        slope = max((sum(stats.binom.pmf(k, 40, success) for k in range(correct - i, 41)) - tail) / i for i in range(1, correct + 1))
        expected = min(1.0, tail + 2 * 200 * 1e-3 * slope)
        assert one_run_p_value(cases=200, guesses=40, correct=correct, epsilon=0.7, delta=1e-3) == pytest.approx(expected, rel=1e-9)


def test_every_start_up_audit_has_coins_of_its_own() -> None:
    first, second = start_up_audit(), start_up_audit()
    assert (first.correct, first.calls) != (second.correct, second.calls)
