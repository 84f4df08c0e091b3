"""The detector learns how images were made, says how sure it may be, and reads nothing that can run."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from dpsynth.detector.evaluation import Answers, calibration, cross_validated, leave_one_generator_out, quality, trained_detector
from dpsynth.detector.model import Detector, fit, logistic, sigmoid
from dpsynth.detector.traces import traces
from dpsynth.errors import ArtifactError

SHAPE = (1, 16, 16)


def pictures(count: int, seed: int, *, noise: float = 6.0, blur: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A soft body of random place and brightness with the noise of a detector, or blurred as a sampler leaves it."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape[1:]), indexing="ij")
    images = []
    for _ in range(count):
        centre, width, bright = rng.uniform(-0.4, 0.4, len(axes)), rng.uniform(0.4, 0.8), rng.uniform(90, 200)
        body = bright * np.exp(-sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)) / width**2) + 20
        image = body + noise * rng.standard_normal(body.shape)
        for axis in list(range(body.ndim)) * blur:
            image = (np.roll(image, 1, axis) + 2 * image + np.roll(image, -1, axis)) / 4
        images.append(np.clip(np.rint(image), 0, 255))
    return np.stack(images)[:, None].astype(np.uint8)


@pytest.fixture(scope="module")
def sides() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Traces of real images, and of two families of generators that blur."""
    synthetic = {
        "blur, once": pictures(150, 2, blur=1),
        "blur, once, noisier": pictures(150, 3, blur=1, noise=9),
        "smooth, little noise": pictures(150, 4, noise=1.5),
        "smooth, less": pictures(150, 5, noise=0.8),
    }
    return traces(pictures(300, 1)), {name: traces(images) for name, images in synthetic.items()}


@pytest.mark.parametrize("shape", [SHAPE, (3, 20, 13), (1, 9, 8, 7), (1, 5, 5)])
def test_traces_are_finite_numbers_that_depend_on_the_image_alone(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    images[3], images[4] = 0, 255
    rows = traces(images)
    assert np.isfinite(rows).all()
    np.testing.assert_allclose(traces(images[2:3])[0], rows[2], rtol=1e-9, atol=1e-12)
    assert np.ptp(rows[:3], axis=0).max() > 0


def test_traces_do_not_tell_place_or_contrast_but_do_tell_blur() -> None:
    """Sharp and blurred images lie many standard deviations apart in some trace; halves of one kind, with the body elsewhere, do not."""
    plain, other, blurred = (traces(pictures(200, seed, blur=blur)) for seed, blur in ((1, 0), (2, 0), (3, 1)))
    spread = plain.std(axis=0) + 1e-6
    assert np.abs((plain.mean(0) - other.mean(0)) / spread).max() < 0.5
    assert np.abs((plain.mean(0) - blurred.mean(0)) / spread).max() > 3
    flipped, upright = traces(np.ascontiguousarray(pictures(50, 1)[..., ::-1])), traces(pictures(50, 1))
    thirds = slice(14, 17)  # of brightness, among which equal grey levels are dealt out by place
    np.testing.assert_allclose(np.delete(flipped, thirds, 1), np.delete(upright, thirds, 1), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(flipped[:, thirds], upright[:, thirds], atol=0.3)


def test_the_regression_is_that_of_a_known_library() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 4))
    answers = (rows @ [1, -2, 0, 0.5] + rng.logistic(size=200) > 0).astype(float)
    weights = rng.uniform(0.5, 1.5, 200)
    found = logistic(rows, answers, weights, ridge=2.0)
    known = LogisticRegression(C=0.5, tol=1e-10, max_iter=1000).fit(rows, answers, sample_weight=weights)
    np.testing.assert_allclose(found, [*known.coef_[0], known.intercept_[0]], atol=2e-3)


def test_quality_is_that_of_a_known_library() -> None:
    rng = np.random.default_rng(1)
    real, synthetic = rng.beta(2, 5, 80), rng.beta(4, 2, 40)
    found = quality(real, synthetic)
    truth, p = np.r_[np.zeros(80), np.ones(40)], np.r_[real, synthetic]
    weights = np.r_[np.full(80, 1 / 80), np.full(40, 1 / 40)]
    assert found.log_loss == pytest.approx(log_loss(truth, p, sample_weight=weights))
    assert found.auc == pytest.approx(roc_auc_score(truth, p))
    assert quality(np.full(50, 0.3), np.full(50, 0.3)).calibration_error == pytest.approx(0.2)
    assert quality(np.full(50, 0.5), np.full(50, 0.5)).log_loss == pytest.approx(np.log(2))


def test_calibration_undoes_overconfidence() -> None:
    rng = np.random.default_rng(2)
    real, synthetic = (
        rng.normal(-0.5, 1, 4000),
        rng.normal(0.5, 1, 2000),
    )  # the log-odds of equal normals a distance of 1 apart are x itself
    slope, intercept = calibration({"a": Answers(real=5 * real + 1, synthetic=5 * synthetic + 1)})
    assert slope == pytest.approx(0.2, abs=0.02)
    assert intercept == pytest.approx(-0.2, abs=0.1)
    odds, truth = 5 * np.r_[real, synthetic] + 1, np.r_[np.zeros(4000), np.ones(2000)]
    known = LogisticRegression(C=1e9, tol=1e-10).fit(odds[:, None], truth, sample_weight=np.where(truth, 2.0, 1.0))
    np.testing.assert_allclose((slope, intercept), (known.coef_[0, 0], known.intercept_[0]), atol=1e-4)


def test_it_recognises_generators_that_it_was_not_trained_on(sides: tuple[np.ndarray, dict[str, np.ndarray]]) -> None:
    made = trained_detector(*sides, shape=SHAPE)
    for row in made.evaluation["generator left out"].values():
        assert row["auc"] > 0.95
        assert row["log_loss"] < 0.35
    fresh = quality(made.probability(pictures(200, 11)), made.probability(pictures(200, 12, blur=1)))
    assert fresh.log_loss < 0.3
    assert set(made.evaluation["family left out"]) == {"blur", "smooth"}


def test_where_there_is_nothing_to_see_it_says_so() -> None:
    """Images of one kind under two names: probabilities near one half, and a log loss of guessing, not the overconfidence of the fit."""
    same = {"a": traces(pictures(120, 7)), "b": traces(pictures(120, 8))}
    made = trained_detector(traces(pictures(200, 6)), same, shape=SHAPE)
    for row in (*made.evaluation["generator left out"].values(), *made.evaluation["generator known"].values()):
        assert 0.35 < row["auc"] < 0.65
        assert 0.66 < row["log_loss"] < 0.76
    assert np.abs(made.probability(pictures(100, 9)) - 0.5).mean() < 0.15


def test_a_generator_that_is_left_out_is_left_out(sides: tuple[np.ndarray, dict[str, np.ndarray]]) -> None:
    """Its own images may change at will: the answers about real images stay, and those about it are of a detector of the others."""
    real, synthetic = sides
    whole = leave_one_generator_out(real, synthetic, shape=SHAPE)
    changed = leave_one_generator_out(real, {**synthetic, "blur, once": 3 + 0 * synthetic["blur, once"]}, shape=SHAPE)
    np.testing.assert_array_equal(whole["blur, once"].real, changed["blur, once"].real)
    others = {name: rows for name, rows in synthetic.items() if name != "blur, once"}
    second = fit(real[150:], others, shape=SHAPE, evaluation={})
    slope, intercept = calibration(cross_validated(real, others, shape=SHAPE))
    np.testing.assert_allclose(whole["blur, once"].real[:150], slope * second.log_odds(real[:150]) + intercept)
    np.testing.assert_allclose(whole["blur, once"].synthetic[:75], slope * second.log_odds(synthetic["blur, once"][:75]) + intercept)


def test_no_image_is_judged_by_a_detector_that_was_trained_on_it(sides: tuple[np.ndarray, dict[str, np.ndarray]]) -> None:
    real, synthetic = sides
    found = cross_validated(real, synthetic, shape=SHAPE)
    second = fit(real[150:], {name: rows[75:] for name, rows in synthetic.items()}, shape=SHAPE, evaluation={})
    for name, rows in synthetic.items():
        np.testing.assert_allclose(found[name].real[:150], second.log_odds(real[:150]))
        np.testing.assert_allclose(found[name].synthetic[:75], second.log_odds(rows[:75]))


def test_one_generator_is_not_enough(sides: tuple[np.ndarray, dict[str, np.ndarray]]) -> None:
    with pytest.raises(ValueError, match="two generators"):
        trained_detector(sides[0], {"blur": sides[1]["blur, once"]}, shape=SHAPE)


def test_it_has_no_opinion_of_another_kind_of_image(sides: tuple[np.ndarray, dict[str, np.ndarray]]) -> None:
    """Nearly all of its own kind it knows, fresh ones too; noise, stripes and blank images it does not."""
    made = trained_detector(*sides, shape=SHAPE)
    for fresh in (pictures(200, 21), pictures(200, 22, blur=1)):
        assert made.knows(traces(fresh)).mean() > 0.97
    rng = np.random.default_rng(0)
    stripes = np.tile((np.arange(16) % 4 * 60).astype(np.uint8), (5, 1, 16, 1))
    for strange in (rng.integers(0, 256, (5, *SHAPE), dtype=np.uint8), stripes, np.full((5, *SHAPE), 90, dtype=np.uint8)):
        assert not made.knows(traces(strange)).any()


def test_it_survives_json(sides: tuple[np.ndarray, dict[str, np.ndarray]]) -> None:
    made = trained_detector(*sides, shape=SHAPE)
    again = Detector.from_json(json.loads(json.dumps(made.to_json(), allow_nan=False)))
    images = pictures(20, 13)
    np.testing.assert_allclose(again.probability(images), made.probability(images), atol=1e-6)
    assert again.evaluation == made.evaluation
    with pytest.raises(ValueError, match="shape"):
        again.probability(images[..., 1:])


@pytest.mark.parametrize(
    "fault",
    [
        {"schema": 2},
        {"shape": [1, 16]},
        {"shape": [1, 3, 3]},
        {"weights": [1.0]},
        {"centre": ["a"]},
        {"scale": None},
        {"bias": float("nan")},
        {"reach": None},
        {"calibration": [1.0]},
        {"evaluation": 3},
    ],
)
def test_a_file_that_is_no_detector_is_refused(fault: dict[str, object], sides: tuple[np.ndarray, dict[str, np.ndarray]]) -> None:
    good = replace(fit(*sides, shape=SHAPE, evaluation={}), calibration=(1.0, 0.0)).to_json()
    assert Detector.from_json(good).shape == SHAPE
    with pytest.raises(ArtifactError):
        Detector.from_json({**good, **fault})
    with pytest.raises(ArtifactError):
        Detector.from_json([])


def test_the_sigmoid_does_not_overflow() -> None:
    np.testing.assert_allclose(sigmoid(np.array([-1e4, 0.0, 1e4])), [0, 0.5, 1])
