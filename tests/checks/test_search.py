"""The search for copies: against brute force, in any blocks; what it forgives, and that two empty slices are no copy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dpsynth.checks import search
from dpsynth.checks.search import Approaches, approaches, nearest_patients
from dpsynth.progress import silent


def unit(count: int, seed: int, width: int = 20) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(0, 1, (count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(("block", "excluded"), [(1, False), (7, False), (40, True)])
def test_the_three_nearest_patients_as_by_brute_force(block: int, excluded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_QUERIES_PER_BLOCK", 11)
    queries, rows, owners = unit(30, 0), unit(120, 1), np.repeat(np.arange(40), 3)
    own = np.random.default_rng(2).integers(0, 40, 30) if excluded else None
    parts = [(rows[np.isin(owners, part)], owners[np.isin(owners, part)]) for part in np.array_split(np.arange(40), -(-40 // block))]
    found = nearest_patients(queries, parts, own=own)
    distances = np.linalg.norm(queries[:, None] - rows[None], axis=2).reshape(30, 40, 3).min(axis=2)
    if own is not None:
        distances[np.arange(30), own] = np.inf
    assert np.array_equal(found.patient, distances.argmin(axis=1))
    assert np.allclose(found.distances, np.sort(distances, axis=1)[:, :3], atol=1e-5)


def test_smallest_ratios_by_patient_and_by_image() -> None:
    ratio = np.array([0.5, 0.9, 0.3, 0.8])
    found = Approaches(item=np.array([1, 0, 1, 0]), patient=np.array([2, 0, 0, 0]), ratio=ratio, copy=ratio, kind=np.zeros(4, dtype=int))
    assert found.per_patient(4).tolist() == [0.3, np.inf, 0.5, np.inf]
    ratios, patients = found.per_item(2)
    assert ratios.tolist() == [0.8, 0.3]
    assert patients.tolist() == [0, 0]


def test_blocks_by_patient_hold_every_image_once_however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    real, patients = rng.uniform(-1, 1, (30, 1, 12, 12)).astype(np.float32), rng.permutation(np.repeat(np.arange(10), 3))
    queries = rng.uniform(-1, 1, (8, 1, 12, 12)).astype(np.float32)
    whole = approaches(queries, real, patients, progress=silent)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(search, "_ROWS_PER_BLOCK", 1)
    monkeypatch.setattr(search, "_IMAGES_PER_PART", 7)  # two patients of three images each; none is split
    small = approaches(queries, real, patients, progress=lambda _, done, total, note="": told.append((done, total)))
    assert np.array_equal(small.patient, whole.patient)
    assert np.allclose(small.ratio, whole.ratio, atol=1e-5)
    assert told == [(done, 30) for done in range(3, 31, 3)]


def test_a_search_that_was_cut_off_goes_on_and_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    real, patients = rng.uniform(-1, 1, (20, 1, 12, 12)).astype(np.float32), np.arange(20)
    queries, own = rng.uniform(-1, 1, (8, 1, 12, 12)).astype(np.float32), np.arange(8)
    whole = approaches(queries, real, patients, own=own, progress=silent)
    monkeypatch.setattr(search, "_IMAGES_PER_PART", 5)
    kept: dict[str, dict[str, np.ndarray]] = {}

    def keep(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        if name not in kept:
            if len(kept) == cut_off_after:
                raise KeyboardInterrupt
            kept[name] = make()
        return kept[name]

    cut_off_after = 2
    with pytest.raises(KeyboardInterrupt):
        approaches(queries, real, patients, own=own, progress=silent, keep=keep)
    cut_off_after, told = 100, list[int]()
    resumed = approaches(queries, real, patients, own=own, progress=lambda _, done, total, note="": told.append(done), keep=keep)
    assert np.array_equal(resumed.patient, whole.patient)
    assert np.allclose(resumed.ratio, whole.ratio, atol=1e-5)
    assert told == [15, 20]  # the first two of four parts are not searched again


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_mirrored_volumes_and_slices_are_found_whichever_axis_is_left_to_right(axis: int) -> None:
    rng = np.random.default_rng(1)
    real = rng.uniform(-1, 1, (12, 1, 10, 10, 10)).astype(np.float32)
    mirrored = np.ascontiguousarray(np.flip(real[3:5], axis))
    found = approaches(mirrored, real, np.arange(12), progress=silent)
    for kind in range(4):
        ratios, patients = found.where(found.kind == kind).per_item(2)
        assert patients.tolist() == [3, 4]
        assert float(ratios.max()) < 0.1


@pytest.mark.parametrize("change", ["shifted", "turned", "enlarged"])
def test_volumes_that_were_moved_a_little_are_found_whole(change: str) -> None:
    """By the variants that are laid down, nearer than without them."""
    rng = np.random.default_rng(3)
    smooth = F.interpolate(torch.from_numpy(rng.uniform(-1, 1, (12, 1, 5, 5, 5)).astype(np.float32)), size=20, mode="trilinear")
    settings = {"shifted": {"shift": (0.14, 0.0, 0.0)}, "turned": {"turn": 0.07}, "enlarged": {"zoom": 0.92}}
    matrix = search._affine(3, **settings[change])  # type: ignore[arg-type]
    moved, real = search._resampled(smooth, matrix).numpy(), smooth.numpy()
    near = search.nearest_patients(search._whole(moved, False)[0], [(search._whole(real, False)[0], np.arange(12))]).distances[:, 0]
    found = approaches(moved, real, np.arange(12), progress=silent)
    whole = found.where(found.kind == 0)
    assert np.array_equal(whole.patient, np.arange(12))
    assert float(whole.ratio.max()) < 0.1
    assert float(near.min()) > 0.1, "without variants they lie apart"


def test_who_is_listed_first_changes_nothing() -> None:
    """Training patients are listed before control patients: what depended on the order would depend on the coins."""
    rng = np.random.default_rng(5)
    real = rng.uniform(-1, 1, (30, 1, 12, 12)).astype(np.float32)
    real[:15, :, :4] += 0.5  # the two halves differ
    order = rng.permutation(30)
    queries = rng.uniform(-1, 1, (6, 1, 12, 12)).astype(np.float32)
    one, other = approaches(queries, real, np.arange(30), progress=silent), approaches(queries, real[order], np.arange(30), progress=silent)
    np.testing.assert_array_equal(order[other.patient], one.patient)
    np.testing.assert_allclose(other.ratio, one.ratio, atol=1e-5)


@pytest.mark.parametrize("frame", [0.0, 1.0])
def test_a_frame_that_all_images_share_hides_no_copy(frame: float) -> None:
    """Thumbnails of faint images in a bright frame are nearly equal; beyond their mean they are as far apart as without it."""
    rng = np.random.default_rng(6)
    real = 0.05 * rng.uniform(-1, 1, (60, 1, 14, 14)).astype(np.float32)
    for side in (real[:, :, :2], real[:, :, -2:], real[:, :, :, :2], real[:, :, :, -2:]):
        side += np.float32(frame)
    found = approaches(real[:5], real, np.arange(60), progress=silent)
    assert found.patient.tolist() == list(range(5))
    assert float(found.ratio.max()) < 0.05
    among = approaches(real, real, np.arange(60), own=np.arange(60), progress=silent)
    assert float(among.ratio.min()) > 0.5
    assert float(among.copy.max()) < 0.05


def test_slices_with_little_in_them_are_not_compared() -> None:
    """The ends of organs are alike by chance: a volume whose end slice is another's is not near to it, one with its middle slice is."""
    rng = np.random.default_rng(7)
    real = rng.uniform(-1, 1, (12, 1, 10, 10, 10)).astype(np.float32)
    real[:, :, 0] *= 0.1
    honest = rng.uniform(-1, 1, (2, 1, 10, 10, 10)).astype(np.float32)
    honest[:, 0, 0] = real[3, 0, 0]
    honest[1, 0, 5] = real[4, 0, 6]
    ratios, patients = approaches(honest, real, np.arange(12), progress=silent).per_item(2)
    assert ratios[0] > 0.5
    assert ratios[1] < 0.1
    assert patients[1] == 4


@pytest.mark.parametrize("dimensions", [2, 3])
def test_nothing_is_near_to_what_is_blank(dimensions: int) -> None:
    """Nor is what has nothing in it near to the one patient of whom that is so, too: neither is compared by the mean of the others."""
    rng = np.random.default_rng(1)
    shape = (1, *(10,) * dimensions)
    real, honest = (rng.uniform(-1, 1, (count, *shape)).astype(np.float32) for count in (30, 2))
    place = () if dimensions == 2 else (0, 0)  # an image, or one slice of a volume
    real[(7, *place)] *= 0.0 if dimensions == 2 else 0.1
    honest[(0, *place)] = -1
    found = approaches(honest, real, np.arange(30), progress=silent)
    assert float(found.ratio.min()) > 0.5


def test_a_slice_that_was_copied_into_a_fuller_volume_is_found() -> None:
    """What is full in the patient's volume is little in the other, which has more contrast everywhere else."""
    rng = np.random.default_rng(8)
    real = rng.uniform(-0.2, 0.2, (12, 1, 10, 10, 10)).astype(np.float32)
    fuller = rng.uniform(-1, 1, (1, 1, 10, 10, 10)).astype(np.float32)
    fuller[0, 0, 5] = real[4, 0, 6]
    ratios, patients = approaches(fuller, real, np.arange(12), progress=silent).per_item(1)
    assert (float(ratios[0]) < 0.1, int(patients[0])) == (True, 4)


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("mirrored", [False, True])
def test_images_on_their_side_are_found_whichever_side_and_mirrored(turns: int, mirrored: bool) -> None:
    rng = np.random.default_rng(4)
    real = rng.uniform(-1, 1, (12, 1, 12, 12)).astype(np.float32)
    copies = np.rot90(real[:3, :, :, ::-1] if mirrored else real[:3], turns, axes=(2, 3))
    found = approaches(np.ascontiguousarray(copies), real, np.arange(12), progress=silent)
    assert found.patient.tolist() == [0, 1, 2]
    assert float(found.ratio.max()) < 0.1


def test_the_ratio_of_an_exact_copy_is_known_beforehand() -> None:
    """`copy` of a patient's image among the others is what a synthetic copy of it comes to among all."""
    rng = np.random.default_rng(2)
    real = rng.uniform(-1, 1, (20, 1, 12, 12)).astype(np.float32)
    expected = approaches(real, real, np.arange(20), own=np.arange(20), progress=silent)
    found = approaches(real, real, np.arange(20), progress=silent)
    assert np.allclose(found.ratio, expected.copy, atol=2e-3)  # products of float32 put an image 0.0003 from itself
    assert np.array_equal(found.patient, np.arange(20))


def test_a_copied_slice_of_a_volume_is_found_along_every_axis_and_empty_slices_are_not() -> None:
    rng = np.random.default_rng(1)
    real = rng.uniform(-1, 1, (12, 1, 10, 10, 10)).astype(np.float32)
    real[:, :, :2] = -1  # nothing to see in the first slices of anybody
    honest = rng.uniform(-1, 1, (3, 1, 10, 10, 10)).astype(np.float32)
    honest[:, :, :2] = -1
    copied = honest.copy()
    copied[0, 0, 4] = real[7, 0, 6]
    copied[1, 0, :, 3] = real[8, 0, :, 3]
    copied[2, 0, :, :, 9] = real[9, 0, :, :, 2]
    clean = approaches(honest, real, np.arange(12), progress=silent).per_item(3)[0]
    ratios, patients = approaches(copied, real, np.arange(12), progress=silent).per_item(3)
    assert patients.tolist() == [7, 8, 9]
    assert float(ratios.max()) < 0.1
    assert float(clean.min()) > 0.5
