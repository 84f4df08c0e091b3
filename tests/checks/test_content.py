"""The filters on single synthetic images: what each finds, what it leaves alone, and that no private image is asked."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from scipy import stats

from dpsynth.checks.burned_text import LIMITS, text_scores
from dpsynth.checks.content import WITHOUT_CAUSE, content
from dpsynth.checks.plausibility import Reference, deviations
from dpsynth.checks.screening import Decision, Screening, keyed_sample, screen, similarity_to_earlier
from dpsynth.checks.statistics import clopper_pearson
from dpsynth.checks.verdict import Outcome
from dpsynth.config import ContentConfig, parse_config
from dpsynth.data.phantom import phantom_cohort
from dpsynth.errors import ConfigError, UsageError
from dpsynth.model.moments import Moments, frequencies, from_frequencies, to_frequencies
from dpsynth.model.thumbnails import thumbnails
from dpsynth.progress import silent

POLICY = ContentConfig()
LOW = 10


def chests(count: int, side: int = 32, seed: int = 0, anatomy: str = "chest") -> np.ndarray:
    """One image of each of `count` procedural patients, (count, 1, side, side) in [-1, 1]."""
    cohort = phantom_cohort(
        anatomy=anatomy,  # type: ignore[arg-type]
        num_patients=count,
        max_images=1,
        spatial_shape=(side, side),
        channels=1,
        classes=("normal", "lesion"),
        seed=seed,
        name="x",
    )
    return np.stack([record.read().voxels for record in cohort.records]).astype(np.float32) / 127.5 - 1


def moments_of(images: np.ndarray) -> Moments:
    layout = frequencies(images.shape[1:], LOW)
    coefficients = to_frequencies(images)
    variance = np.where(layout.band < 0, 0, (coefficients**2).mean(axis=0))
    low = coefficients[:, layout.low]
    return Moments(
        shape=images.shape[1:],
        low_frequencies=LOW,
        counts=np.array([float(len(images))]),
        mean=low.mean(axis=0)[None],
        covariance=np.cov(low, rowvar=False)[None],
        variance=variance[None],
    )


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.of(moments_of(chests(400, seed=1)))


def screened(images: np.ndarray, reference: Reference, policy: ContentConfig = POLICY, key: bytes = b"k") -> Screening:
    images = np.ascontiguousarray(images, dtype=np.float32)
    return screen(images, np.zeros(len(images), dtype=np.int64), reference, policy, sample_key=key, progress=silent)


def test_ordinary_images_pass_all_filters(reference: Reference) -> None:
    """Images of the same kind as the reference: not one in 300 goes to a person or out."""
    verdict = content(screened(chests(300, seed=2), reference), POLICY, withheld=0)
    assert verdict.outcome is Outcome.PASS, verdict.reason
    assert verdict.public


FAULTS = {
    "contrast": lambda image: image * 0 + 0.2,
    "saturated": lambda image: np.where(image > -0.99, 1.0, image),
    "detail": lambda image: np.clip(image + np.random.default_rng(0).normal(0, 1, image.shape), -1, 1),
}


@pytest.mark.parametrize("ground", FAULTS)
def test_one_faulty_image_among_many_is_found_by_its_name(ground: str, reference: Reference) -> None:
    images = chests(60, seed=3)
    images[17] = FAULTS[ground](images[17])
    found = screened(images, reference)
    assert found.crossed(ground, Decision.REVIEW)[17]
    assert not found.of(Decision.PASS)[17]
    assert found.of(Decision.PASS).sum() == 59


def test_doubles_are_out_and_the_first_stays(reference: Reference) -> None:
    images = chests(40, seed=4)
    images[[9, 30]] = images[5] + np.random.default_rng(0).normal(0, 0.004, images[5].shape)
    rejected = screened(images, reference).of(Decision.REJECT)
    assert np.flatnonzero(rejected).tolist() == [9, 30]


def test_similarity_is_the_plain_loop() -> None:
    images = chests(30, seed=5, side=16)
    rows = thumbnails(images)
    loop = [-1.0, *(max(float(rows[i] @ rows[j]) for j in range(i)) for i in range(1, len(rows)))]
    np.testing.assert_allclose(similarity_to_earlier(images, progress=silent), loop, atol=1e-9)


def test_other_anatomy_is_found_more_often_than_not_and_own_anatomy_hardly_ever(reference: Reference) -> None:
    """The power that is stated: half of brains among chests, all noise; 1 of 1000 chests at most."""
    brains = deviations(chests(100, seed=6, anatomy="brain"), np.zeros(100, dtype=np.int64), reference)[0]
    own = deviations(chests(300, seed=7), np.zeros(300, dtype=np.int64), reference)[0]
    upside_down = deviations(np.ascontiguousarray(chests(100, seed=8)[:, :, ::-1]), np.zeros(100, dtype=np.int64), reference)[0]
    limit = POLICY.structure[0]
    assert (own > limit).mean() < 0.01
    assert (brains > limit).mean() > 0.2
    assert (upside_down > limit).mean() > 0.2


def test_the_structure_is_one_on_average_for_gaussian_images() -> None:
    """Oracle: of draws from the reference's own Gaussian the statistic has mean 1, whatever the covariance."""
    rng = np.random.default_rng(0)
    moments = moments_of(chests(300, side=16, seed=9))
    layout = frequencies(moments.shape, LOW)
    coefficients = np.zeros((3000, layout.band.size))
    coefficients[:, layout.low] = rng.multivariate_normal(moments.mean[0], moments.covariance[0], 3000)
    structure, _ = deviations(from_frequencies(coefficients, moments.shape), np.zeros(3000, dtype=np.int64), Reference.of(moments))
    assert structure.mean() == pytest.approx(1, rel=0.05)


def burned(images: np.ndarray, size: int, text: str = "DOE JOHN", seed: int = 0) -> np.ndarray:
    rng, font, result = np.random.default_rng(seed), ImageFont.load_default(size=size), []
    for image in images:
        picture = Image.fromarray(np.asarray((image[0] + 1) * 127.5, dtype=np.uint8))
        draw = ImageDraw.Draw(picture)
        room = max(2, int(picture.width - draw.textlength(text, font=font)))
        draw.text((rng.integers(1, room), rng.integers(1, picture.height - size - 3)), text, fill=255, font=font)
        result.append(np.asarray(picture, dtype=np.float32)[None] / 127.5 - 1)
    return np.stack(result)


def test_burned_in_names_are_found_and_plain_images_are_not() -> None:
    """Stated power of strokes: most names in print of 14 pixels and more on 128-pixel images, no alarm on 80 plain ones."""
    images = chests(80, side=128, seed=10)
    plain = text_scores(images, reader="strokes", task="", progress=silent)
    written = text_scores(burned(images, 14), reader="strokes", task="", progress=silent)
    assert (plain > LIMITS["strokes"]).sum() == 0
    assert (written > LIMITS["strokes"]).mean() > 0.8


def test_text_is_not_looked_for_where_none_can_be_read(reference: Reference) -> None:
    found = screened(chests(5, seed=11), reference)
    assert not found.text_was_read
    assert (found.measured["text"] == 0).all()
    assert "too small for text" in content(found, POLICY, withheld=0).reason


def test_a_collapsed_generator_fails_and_withheld_images_count() -> None:
    images = np.repeat(chests(4, seed=12), 25, axis=0)
    reference = Reference.of(moments_of(chests(200, seed=13)))
    verdict = content(screened(images, reference), POLICY, withheld=0)
    assert verdict.outcome is Outcome.FAIL
    assert "similarity" in verdict.reason
    good = screened(chests(95, seed=14), reference)
    assert content(good, POLICY, withheld=1).outcome is Outcome.PASS
    assert content(good, POLICY, withheld=5).outcome is Outcome.FAIL
    assert content(None, POLICY, withheld=0).outcome is Outcome.INCONCLUSIVE


def test_every_decision_is_logged_with_its_grounds(reference: Reference) -> None:
    images = chests(30, seed=15)
    images[3] = 0.1
    rows = screened(images, reference).log(np.arange(30, dtype=np.uint64) + 100)
    assert len(rows) == 30
    assert rows[3]["decision"] == "reject"
    assert rows[3]["grounds"] == ["contrast"]
    assert rows[3]["seed"] == 103
    assert sum(row["sample"] for row in rows) == POLICY.person_sees


def test_the_sample_for_a_person_follows_from_the_key_and_from_nothing_else() -> None:
    images = chests(50, seed=16)
    first = keyed_sample(images, 10, key=b"a")
    assert first.sum() == 10
    assert (first == keyed_sample(images, 10, key=b"a")).all()
    assert (first != keyed_sample(images, 10, key=b"b")).any()
    counts = sum(keyed_sample(images, 10, key=bytes([number])).astype(int) for number in range(200))
    assert 15 < counts.min() <= counts.max() < 70, "each image comes 40 times in 200 on average; outside 15..70 once in 10,000"


def test_a_reader_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UsageError, match=r"pip install 'dpsynth\[ocr\]'"):
        text_scores(chests(1, side=48), reader="ocr", task="", progress=silent)


@pytest.mark.slow
def test_ocr_reads_what_strokes_miss() -> None:
    """Needs `dpsynth[ocr]`: small print on 64-pixel images is found in most, on plain ones in none."""
    pytest.importorskip("rapidocr")
    images = chests(8, side=64, seed=20)
    assert (text_scores(burned(images, 8), reader="ocr", task="", progress=silent) > LIMITS["ocr"]).mean() >= 0.75
    assert (text_scores(images, reader="ocr", task="", progress=silent) == 0).all()


@pytest.mark.parametrize(
    "setting", ["contrast: [0.01, 0.02]", "similarity: [0.9999, 0.9]", "structure: [0, 5]", "person_sees: -1", "text: guess"]
)
def test_a_policy_that_makes_no_sense_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"gate\.content"):
        parse_config(f"gate: {{content: {{{setting}}}}}", base=Path())


def test_the_stated_rate_is_that_of_failing_and_what_a_person_may_see_in_vain_is_said_besides(reference: Reference) -> None:
    """0 of 4,100 honest images bound the rate of one image at 0.07 %, which is no rate of the check: more images, more flags."""
    assert clopper_pearson(0, 4100, 0.9)[1] == pytest.approx(WITHOUT_CAUSE)
    small, large = (content(screened(chests(count, seed=30), reference), POLICY, withheld=0) for count in (40, 200))
    assert small.false_alarm_rate == pytest.approx(1 - (1 - WITHOUT_CAUSE) ** 40)  # a single one is above 2 % of 40
    assert large.false_alarm_rate == pytest.approx(stats.binom.sf(4, 200, WITHOUT_CAUSE))
    assert f"of honest images at most 0.07%, here {200 * WITHOUT_CAUSE:.1f}, are for a person without cause" in large.reason


def test_every_reason_says_which_share_would_have_been_seen(reference: Reference) -> None:
    """A fault of 1.49 % of what is drawn is missed in 200 images with probability 0.05."""
    good = chests(200, seed=31)
    missed = (1 - 0.0149) ** 200
    assert missed == pytest.approx(0.05, rel=0.01)
    grey, flat = good.copy(), np.repeat(good[:4], 50, axis=0)
    grey[0] = np.where(np.arange(32 * 32).reshape(32, 32) % 2, 0.0, 0.05)
    found = {content(screened(images, reference), POLICY, withheld=0).outcome: images for images in (good, grey, flat)}
    assert {Outcome.PASS, Outcome.FAIL} <= set(found)
    for images in found.values():
        reason = content(screened(images, reference), POLICY, withheld=0).reason
        assert "in 1.49% of what is drawn, would have been seen with probability 0.95" in reason


@pytest.mark.parametrize("repetitions", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_honest_images_go_to_a_person_no_more_often_than_is_said(repetitions: int, reference: Reference) -> None:
    """Sets of 40: at 0.07 % an image more are shown than stated less than once in 1,000; and none fails."""
    shown = 0
    for seed in range(repetitions):
        verdict = content(screened(chests(40, seed=100 + seed), reference), POLICY, withheld=0)
        assert verdict.outcome is not Outcome.FAIL
        shown += int(verdict.figures["for a person"])
    assert stats.binom.sf(shown - 1, 40 * repetitions, WITHOUT_CAUSE) > 1e-3, shown
