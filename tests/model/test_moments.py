"""The private moments: what one patient can change, what noise is added, and what comes out without noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpsynth.model import moment_release as release
from dpsynth.model import moments as module
from dpsynth.model import noised_sums
from dpsynth.model.moment_release import moment_queries, release_moments
from dpsynth.model.moments import Moments, frequencies, from_frequencies, public_reference, sample_moment_images, to_frequencies
from dpsynth.model.noised_sums import NoisedSums, patient_sum
from dpsynth.privacy.mechanism import MomentRelease
from dpsynth.privacy.noise import NoiseStream

LOW = 4
RNG = np.random.default_rng(0)


def smooth_images(count: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    coefficients = np.random.default_rng(seed).normal(size=(count, int(np.prod(shape))))
    decay = np.stack(np.meshgrid(*(np.arange(side) for side in shape[1:]), indexing="ij")).sum(0).ravel()
    return np.clip(from_frequencies(coefficients * np.tile(3 * 0.6**decay, shape[0]), shape), -1, 1)


PUBLIC = smooth_images(200, (1, 8, 8), 1)
REFERENCE = public_reference(PUBLIC, low_frequencies=LOW)


def booked(noise_multiplier: float = 2.0) -> MomentRelease:
    return MomentRelease(noise_multiplier=noise_multiplier, queries=moment_queries(REFERENCE))


def test_frequencies_and_back() -> None:
    images = RNG.uniform(-1, 1, (3, 2, 6, 8)).astype(np.float32)
    assert np.allclose(from_frequencies(to_frequencies(images), (2, 6, 8)), images, atol=1e-5)
    assert np.allclose((to_frequencies(images) ** 2).sum(1), (images.astype(float) ** 2).sum((1, 2, 3)))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 12), (1, 8, 8, 8), (1, 32, 32)])
def test_no_band_mixes_low_and_other_coefficients(shape: tuple[int, ...]) -> None:
    layout = frequencies(shape, min(12, shape[1]))
    assert len(layout.low) <= module.LARGEST_LOW_BLOCK
    assert set(layout.band[layout.low]) == {-1}
    assert (np.delete(layout.band, layout.low) >= 0).all()
    assert layout.band.max() < layout.num_bands


def test_without_noise_the_moments_are_the_moments() -> None:
    images, labels = smooth_images(300, (1, 8, 8), 2), np.arange(300) % 2
    inside = replace(REFERENCE, clip_low=1e3, clip_residuals=np.full(LOW**2, 1e3), clip_scales=1e3, clip_energies=1e6)
    found = release_moments(images, labels, np.arange(300), num_classes=2, mechanism=None, reference=inside, stream=None)
    low = to_frequencies(images)[:, frequencies((1, 8, 8), LOW).low]
    assert np.allclose(found.counts, [150, 150])
    for label in range(2):
        own = low[labels == label]
        assert np.allclose(found.mean[label], own.mean(0), atol=1e-6)
    pooled = np.mean([np.cov(low[labels == label].T, bias=True) for label in range(2)], axis=0)
    assert np.linalg.norm(found.covariance.mean(0) - pooled) < 0.02 * np.linalg.norm(pooled)
    total = np.stack([to_frequencies(images[labels == label]).var(0).sum() for label in range(2)])
    explained = np.trace(found.covariance, axis1=1, axis2=2) + found.variance.sum(1)
    assert np.allclose(explained, total, rtol=0.05)  # no energy lost or invented


patients = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from(["plain", "black", "white", "checks", "huge", "nan"])), min_size=1, max_size=4
)


def picture(kind: str, seed: int) -> np.ndarray:
    checks = (np.indices((8, 8)).sum(0) % 2 * 2.0 - 1)[None]
    made = {"plain": smooth_images(1, (1, 8, 8), seed)[0], "black": -np.ones((1, 8, 8)), "white": np.ones((1, 8, 8)), "checks": checks}
    extreme = {"huge": 1e4 * checks, "nan": np.full((1, 8, 8), np.nan)}
    return np.asarray({**made, **extreme}[kind], dtype=np.float32)


class _Sums:
    """Stands for the noise: keeps the exact sums that each query would add noise to, and answers with fixed other sums.

    Later queries use the results of earlier ones, so the bound has to hold for any fixed answers.
    """

    def __init__(self, answers: dict[str, np.ndarray] | None) -> None:
        self.answers, self.seen = answers, {}

    def __call__(self, release: object, name: str, rows: Callable[[slice], np.ndarray], clip_norm: float) -> np.ndarray:
        total = patient_sum(rows, release.labels, release.patients, release.num_classes, clip_norm)  # type: ignore[attr-defined]
        self.seen[name] = total
        return total if self.answers is None else self.answers[name]


def sums(
    images: np.ndarray,
    labels: np.ndarray,
    owners: np.ndarray,
    answers: dict[str, np.ndarray] | None,
    labels_of_cells: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    recorder = _Sums(answers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoisedSums, "noised_sum", lambda self, name, rows, clip: recorder(self, name, rows, clip))
        patch.setattr(NoisedSums, "noise_stddev", lambda self, name: 0.0 if labels_of_cells is None else 0.5)
        made = release_moments(
            images, labels, owners, num_classes=2 if labels_of_cells is None else len(labels_of_cells), mechanism=None,
            reference=REFERENCE, stream=None, labels_of_cells=labels_of_cells,
        )  # fmt: skip
    return recorder.seen, made.to_arrays()


def require_bound(one: list[tuple[int, str]], classes: int, labels_of_cells: np.ndarray | None = None) -> None:
    """A patient with these (class, picture) changes each sum by at most the booked clip norm, and nothing else that comes out."""
    others = smooth_images(30, (1, 8, 8), 5)
    extra = np.stack([picture(kind, index) for index, (_, kind) in enumerate(one)])
    labels = np.concatenate([np.arange(30) % classes, [label for label, _ in one]]).astype(np.int64)
    images, owners = np.concatenate([others, extra]), np.concatenate([np.arange(30), np.full(len(one), 30)])
    with np.errstate(all="ignore"):
        answers, _ = sums(others, labels[:30], owners[:30], None, labels_of_cells)
        with_patient, first = sums(images, labels, owners, answers, labels_of_cells)
        without, second = sums(others, labels[:30], owners[:30], answers, labels_of_cells)
    # What comes out depends on the patients through the noised sums alone.
    assert all(np.array_equal(first[name], array) for name, array in second.items())
    for query in moment_queries(REFERENCE):
        change = np.linalg.norm(with_patient[query.name] - without[query.name])
        assert change <= query.clip_norm * (1 + 1e-9), query.name


@settings(max_examples=40, deadline=None)
@given(patients)
def test_one_patient_changes_each_sum_by_at_most_the_booked_clip_norm(one: list[tuple[int, str]]) -> None:
    require_bound(one, 2)


LABELS_OF_CELLS = np.array([0, 0, 0, 1, 1, 1])
in_cells = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(["plain", "black", "white", "checks", "huge", "nan"])), min_size=1, max_size=12
)


@settings(max_examples=40, deadline=None)
@given(in_cells)
def test_a_patient_with_images_in_many_cells_changes_each_sum_by_no_more(one: list[tuple[int, str]]) -> None:
    """Cells share the bound of one patient; they do not have one each."""
    require_bound(one, 6, LABELS_OF_CELLS)


@pytest.mark.parametrize("images", [1, 127, 128, 129, 257])
def test_the_bound_holds_for_the_last_image_however_many_there_are(images: int) -> None:
    rows = np.zeros((images, 3))
    rows[-1] = 1e6
    owners = np.arange(images)
    assert np.linalg.norm(patient_sum(lambda part: rows[part], np.zeros(images, dtype=np.int64), owners, 1, 0.5)) <= 0.5 * (1 + 1e-9)


def test_that_oracle_sees_a_bound_for_each_cell_instead_of_each_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded = patient_sum

    def per_cell(
        rows: Callable[[slice], np.ndarray], labels: np.ndarray, patients: np.ndarray, classes: int, clip_norm: float
    ) -> np.ndarray:
        return bounded(rows, labels, patients * classes + labels, classes, clip_norm)

    monkeypatch.setitem(globals(), "patient_sum", per_cell)
    monkeypatch.setattr(noised_sums, "patient_sum", per_cell)
    with pytest.raises(AssertionError, match="means"):
        test_a_patient_with_images_in_many_cells_changes_each_sum_by_no_more.hypothesis.inner_test([(0, "white"), (1, "white")])


def test_a_sum_over_many_images_is_that_of_a_loop_over_patients() -> None:
    """Images come in parts; one that is left out or counted twice between two parts would be seen."""
    rng = np.random.default_rng(3)
    patients, labels = rng.integers(0, 170, size=700), rng.integers(0, 3, size=700)
    patients[:170] = np.arange(170)
    rows = rng.normal(size=(700, 5)) * rng.lognormal(size=(700, 1))
    rows[5] = np.nan
    expected = np.zeros((3, 5))
    for patient in range(170):
        own = np.flatnonzero(patients == patient)
        for image in own[np.isfinite(rows[own]).all(axis=1)]:
            expected[labels[image]] += rows[image] * min(1, 1.5 / np.linalg.norm(rows[image])) / len(own)
    np.testing.assert_allclose(patient_sum(rows.__getitem__, labels, patients, 3, 1.5), expected, rtol=1e-12, atol=1e-12)
    assert patient_sum(np.zeros((0, 5)).__getitem__, labels[:0], patients[:0], 3, 1.5).shape == (3, 5)


def noise_p(noise_multiplier: float, claimed: MomentRelease) -> float:
    """Smallest two-sided p-value, times their number, that each class of each query has noise of the booked scale."""
    classes, labels = 4, np.arange(50) % 4
    rows, draws = np.ones((50, 40)) * 0.01, []
    for key in range(60):
        stream = NoiseStream(key=bytes([key]) * 32)
        release = NoisedSums(labels=labels, patients=np.arange(50), num_classes=classes, mechanism=booked(noise_multiplier), stream=stream)
        for query in moment_queries(REFERENCE):
            exact = patient_sum(rows.__getitem__, labels, np.arange(50), classes, query.clip_norm)
            draws.append((release.noised_sum(query.name, rows.__getitem__, query.clip_norm) - exact) / claimed.noise_stddev(query.name))
    groups = len(moment_queries(REFERENCE)) * classes
    blocks = np.array(draws).reshape(60, groups, 40).transpose(1, 0, 2).reshape(groups, -1)
    correlation = np.corrcoef(blocks) - np.eye(len(blocks))
    assert np.abs(correlation).max() < 6 / np.sqrt(blocks.shape[1]), "classes or queries share noise"
    energies, count = np.sum(blocks**2, axis=1), blocks.shape[1]
    return float(2 * min(np.minimum(stats.chi2.cdf(energies, count), stats.chi2.sf(energies, count))) * len(blocks))


def test_the_noise_has_the_booked_scale_and_other_scales_are_rejected() -> None:
    assert noise_p(2.0, booked(2.0)) > 1e-4
    for wrong in (1.0, 1.9, 2.1):
        assert noise_p(wrong, booked(2.0)) < 1e-4


@pytest.mark.parametrize("name", [query.name for query in moment_queries(REFERENCE)])
def test_another_clip_norm_than_the_booked_one_is_refused_for_each_query(name: str) -> None:
    queries = tuple(replace(query, clip_norm=(1 + (query.name == name)) * query.clip_norm) for query in moment_queries(REFERENCE))
    mechanism = MomentRelease(noise_multiplier=1.0, queries=queries)
    labels, owners, stream = np.zeros(200, dtype=np.int64), np.arange(200), NoiseStream(key=b"k" * 32)
    with pytest.raises(ValueError, match=f"{name!r} is not the booked one"):
        release_moments(PUBLIC, labels, owners, num_classes=1, mechanism=mechanism, reference=REFERENCE, stream=stream)


def test_a_mechanism_without_a_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="or neither"):
        release_moments(
            PUBLIC, np.zeros(200, dtype=np.int64), np.arange(200), num_classes=1, mechanism=booked(), reference=REFERENCE, stream=None
        )


@pytest.mark.parametrize("noise_multiplier", [0.1, 5.0, 200.0])
@pytest.mark.parametrize("classes", [1, 3])
def test_whatever_the_noise_the_moments_are_usable(noise_multiplier: float, classes: int) -> None:
    images, labels = smooth_images(60, (1, 8, 8), 4), np.zeros(60, dtype=np.int64)
    labels[: classes - 1] = np.arange(1, classes)  # one patient in each other class
    found = release_moments(
        images, labels, np.arange(60), num_classes=classes, mechanism=booked(noise_multiplier), reference=REFERENCE,
        stream=NoiseStream(key=b"k" * 32),
    )  # fmt: skip
    assert np.linalg.eigvalsh(found.covariance).min() > -1e-9
    assert np.delete(found.variance, frequencies((1, 8, 8), LOW).low, axis=1).min() > 0
    assert (found.counts > 0).all()
    assert found.probabilities.sum() == pytest.approx(1)
    again = Moments.from_arrays(found.to_arrays(), shape=found.shape, low_frequencies=found.low_frequencies)
    assert all(np.array_equal(getattr(again, name), array) for name, array in found.to_arrays().items())


def test_sampled_images_have_the_moments() -> None:
    low = LOW * LOW
    root = RNG.normal(size=(low, low)) * 0.02
    known = Moments(
        shape=(1, 8, 8), low_frequencies=LOW, counts=np.ones(1), mean=RNG.normal(size=(1, low)) * 0.1,
        covariance=(root @ root.T)[None], variance=np.full((1, 64), 1e-6),
    )  # fmt: skip
    images = sample_moment_images(known, np.zeros(4000, dtype=np.int64), np.arange(4000, dtype=np.uint64), texture=False)
    coefficients = to_frequencies(images)[:, frequencies((1, 8, 8), LOW).low]
    assert np.abs(coefficients.mean(0) - known.mean[0]).max() < 0.01
    assert np.linalg.norm(np.cov(coefficients.T) - known.covariance[0]) < 0.1 * np.linalg.norm(known.covariance[0])
    few = sample_moment_images(known, np.zeros(3, dtype=np.int64), np.arange(3, dtype=np.uint64), texture=False)
    assert np.allclose(few, images[:3], atol=1e-6)


def test_another_machine_finds_the_same_axes_and_draws_the_same_images(other_signs: Callable[[], None]) -> None:
    found = release_moments(PUBLIC, np.arange(200) % 2, np.arange(200), num_classes=2, mechanism=None, reference=REFERENCE, stream=None)
    labels, seeds = np.array([0, 1, 1]), np.arange(3, dtype=np.uint64)
    here = sample_moment_images(found, labels, seeds, texture=True)
    other_signs()
    assert np.allclose(public_reference(PUBLIC, low_frequencies=LOW).principal.axes, REFERENCE.principal.axes)
    assert np.allclose(sample_moment_images(found, labels, seeds, texture=True), here, atol=1e-6)


def test_volumes_and_colour() -> None:
    for shape in ((1, 8, 8, 8), (3, 8, 8)):
        images = smooth_images(40, shape, 6)
        reference = public_reference(images, low_frequencies=3)
        found = release_moments(images, np.arange(40) % 2, np.arange(40), num_classes=2, mechanism=None, reference=reference, stream=None)
        drawn = sample_moment_images(found, np.array([0, 1]), np.array([1, 2], dtype=np.uint64), texture=True)
        assert drawn.shape == (2, *shape)


def excess(found: Moments, images: np.ndarray, labels: np.ndarray, sigma: float = 0.2) -> float:
    """Mean squared error of denoising with these moments, as a multiple of the error with the true ones."""
    low = to_frequencies(images)[:, frequencies((1, 8, 8), LOW).low]

    def error(means: np.ndarray, covariances: np.ndarray) -> float:
        total = 0.0
        for label in range(len(means)):
            own = low[labels == label] - means[label]
            gain = covariances[label] @ np.linalg.inv(covariances[label] + sigma**2 * np.eye(low.shape[1]))
            bias, remains = own - own @ gain.T, sigma**2 * np.trace(gain @ gain.T)
            total += float((bias**2).sum() + len(own) * remains)
        return total

    truth = [low[labels == label] for label in range(found.num_classes)]
    return error(found.mean, found.covariance) / error(
        np.stack([rows.mean(0) for rows in truth]), np.stack([np.cov(rows.T, bias=True) for rows in truth])
    )


@pytest.mark.parametrize("alone", ["mean", "covariance"])
def test_noise_costs_little_because_public_images_fill_what_it_hides(alone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means and covariances each by themselves, the other as it is: around a wrong mean a better covariance may denoise worse."""
    images, labels = smooth_images(1000, (1, 8, 8), 7), np.arange(1000) % 2
    low = to_frequencies(images)[:, frequencies((1, 8, 8), LOW).low]
    true = {"mean": np.stack([low[labels == label].mean(0) for label in range(2)])}
    true["covariance"] = np.stack([np.cov(low[labels == label].T, bias=True) for label in range(2)])
    other = {name: array for name, array in true.items() if name != alone}

    def released(noise_multiplier: float) -> float:
        found = [
            release_moments(
                images, labels, np.arange(1000), num_classes=2, mechanism=booked(noise_multiplier), reference=REFERENCE,
                stream=NoiseStream(key=bytes([key]) * 32),
            )
            for key in range(6)
        ]  # fmt: skip
        return float(np.mean([excess(replace(one, **other), images, labels) for one in found]))

    least, most = {"mean": (1.01, 1.3), "covariance": (1.02, 1.03)}[alone]
    assert released(1.0) < least
    assert released(30.0) < most
    monkeypatch.setattr(release, "_axes_above", lambda _, variances, **__: len(variances))
    monkeypatch.setattr(release, "pooled_means", lambda totals, counts, *_, **__: totals / np.maximum(counts, 1)[:, None])
    monkeypatch.setattr(release, "pooled_covariances", lambda totals, counts, *_, **__: totals / np.maximum(counts, 1)[:, None, None])
    assert released(30.0) > most + 0.1


def test_how_many_axes_are_released_follows_from_released_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never from the number of patients itself, which is private: the width of the answer would tell it without noise."""
    asked, chosen = [], release._axes_above

    def recorded(noise_multiplier: float, variances: np.ndarray, *, patients: float) -> int:
        asked.append((noise_multiplier, patients))
        assert np.array_equal(variances, REFERENCE.principal.shaped_variances)  # public ones: which axes are strong is private, too
        return chosen(noise_multiplier, variances, patients=patients)

    monkeypatch.setattr(release, "_axes_above", recorded)
    images, mechanism = smooth_images(60, (1, 8, 8), 9), booked(3.0)
    widths: dict[str, int] = {}
    found = release_moments(
        images, np.arange(60) % 2, np.arange(60), num_classes=2, mechanism=mechanism, reference=REFERENCE,
        stream=NoiseStream(key=b"w" * 32), record=lambda name, _, noised: widths.update({name: noised.shape[1]}),
    )  # fmt: skip
    assert asked == [(pytest.approx(mechanism.query_noise_multiplier("second_moments")), pytest.approx(found.counts.sum()))]
    assert abs(found.counts.sum() - 60) > 1  # so that the true number would not pass
    axes = chosen(asked[0][0], REFERENCE.principal.shaped_variances, patients=float(found.counts.sum()))
    assert widths["second_moments"] == axes * (axes + 1) // 2


def test_few_axes_are_released_at_the_clip_norm_that_all_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the noise on them stays what it was, and leaving the others out gains nothing."""
    monkeypatch.setattr(release, "_axes_above", lambda *_, **__: 3)
    sums: dict[str, np.ndarray] = {}
    release_moments(
        smooth_images(1000, (1, 8, 8), 9), np.arange(1000) % 2, np.arange(1000), num_classes=2, mechanism=booked(0.1), reference=REFERENCE,
        stream=NoiseStream(key=b"c" * 32), record=lambda name, exact, _: sums.update({name: exact}),
    )  # fmt: skip
    diagonal = sums["second_moments"].sum(axis=0)[[0, 3, 5]].sum()  # of a row that is cut down, the clip norm
    assert 0.8 < diagonal / 1000 / booked().query("second_moments").clip_norm <= 1


def test_axes_are_released_that_stand_above_the_noise() -> None:
    """More of them with more patients or less noise, whatever the unit of the images; without noise all, and never too few to test."""
    variances = 0.97 ** np.arange(99, -1, -1)
    counted = {
        (noise, patients): release._axes_above(noise, variances, patients=patients)
        for noise in (0.0, 1.0, 10.0, 1e6)
        for patients in (1000, 10_000)
    }
    assert counted[0.0, 1000] == 100
    assert counted[1e6, 1000] == release._FEWEST_AXES
    assert release._FEWEST_AXES < counted[1.0, 1000] == counted[10.0, 10_000] < counted[1.0, 10_000] < 100
    assert release._axes_above(1.0, 7 * variances, patients=1000) == counted[1.0, 1000]
    kept = variances[-counted[1.0, 1000] :]
    assert 1000 * kept[0] / kept.sum() >= release._ABOVE_NOISE
    one_more = variances[-counted[1.0, 1000] - 1 :]
    assert 1000 * one_more[0] / one_more.sum() < release._ABOVE_NOISE
    assert release._axes_above(1e6, np.ones(4), patients=1000) == 4


@pytest.mark.parametrize("strength", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("noise_multiplier", [0.01, 3.0])
def test_images_much_stronger_or_weaker_than_the_public_ones_lose_no_energy(strength: float, noise_multiplier: float) -> None:
    """Clip norms come from public images; another hospital's fine detail may be several times theirs, and patients differ in it."""
    layout = frequencies((1, 8, 8), LOW)
    coefficients = to_frequencies(smooth_images(1000, (1, 8, 8), 11))
    coefficients[:, layout.band >= 0] *= np.sqrt(strength)
    coefficients[:, layout.low] *= strength**0.25
    coefficients *= np.exp(np.random.default_rng(0).normal(0, 0.3, (1000, 1)))
    labels = np.arange(1000) % 2
    found = release_moments(
        from_frequencies(coefficients, (1, 8, 8)), labels, np.arange(1000), num_classes=2, mechanism=booked(noise_multiplier),
        reference=REFERENCE, stream=NoiseStream(key=b"e" * 32),
    )  # fmt: skip
    for label in range(2):
        own = coefficients[labels == label]
        for rows, variance in (
            (layout.low, np.trace(found.covariance[label])), (layout.band >= 0, found.variance[label].sum()),
        ):  # fmt: skip
            assert variance == pytest.approx(own[:, rows].var(axis=0).sum(), rel=0.25)


def test_what_drowns_in_noise_is_the_public_covariance() -> None:
    images, labels = smooth_images(300, (1, 8, 8), 8), np.arange(300) % 2
    found = release_moments(
        images, labels, np.arange(300), num_classes=2, mechanism=booked(1e4), reference=REFERENCE, stream=NoiseStream(key=b"d" * 32)
    )
    low = to_frequencies(PUBLIC)[:, frequencies((1, 8, 8), LOW).low]
    public = np.cov(low.T, bias=True)
    for covariance in found.covariance:
        scaled = covariance * np.trace(public) / np.trace(covariance)
        assert np.linalg.norm(scaled - public) < 0.1 * np.linalg.norm(public)
