"""The digest names what is seen: equal for candidates and for the archive of them, another for any change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpsynth.data.candidates import Candidates
from dpsynth.data.images_digest import archive_digest, images_digest
from dpsynth.data.medmnist import write_npz
from dpsynth.errors import ArtifactError


def candidates(shape: tuple[int, ...]) -> Candidates:
    rng = np.random.default_rng(0)
    sex = {"sex": np.array(["F", "M", "F", "F"])}
    images = rng.integers(0, 256, (4, *shape), dtype=np.uint8)
    return Candidates(images=images, labels=np.array([0, 1, 1, 0]), seeds=np.arange(4, dtype=np.uint64), attributes=sex)


def archived(path: Path, found: Candidates) -> str:
    marks = {"synthetic": np.array(1, dtype=np.uint8), **{f"train_{name}": values for name, values in found.attributes.items()}}
    write_npz(path, images=found.images, labels=found.labels, extra=marks)
    return archive_digest(path)


@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 6, 5), (1, 4, 6, 5)])
def test_candidates_and_their_archive_have_one_digest(tmp_path: Path, shape: tuple[int, ...]) -> None:
    found = candidates(shape)
    assert archived(tmp_path / "a.npz", found) == images_digest(found)


def test_every_change_of_what_is_seen_changes_it_and_seeds_do_not() -> None:
    found = candidates((1, 6, 5))
    one_pixel = found.images.copy()
    one_pixel[2, 0, 3, 3] ^= 1
    changed = [
        replace(found, images=one_pixel),
        replace(found, images=found.images[::-1]),
        replace(found, images=found.images.reshape(4, 1, 5, 6)),
        replace(found, labels=np.array([1, 1, 1, 0])),
        replace(found, attributes={"sex": np.array(["M", "M", "F", "F"])}),
        replace(found, attributes={}),
        found.kept(np.array([True, True, True, False])),
    ]
    digests = {images_digest(other) for other in (found, *changed)}
    assert len(digests) == 1 + len(changed)
    assert images_digest(replace(found, seeds=found.seeds + 1)) == images_digest(found)


def test_the_last_of_many_images_counts() -> None:
    found = Candidates(images=np.zeros((1001, 1, 2, 2), np.uint8), labels=np.zeros(1001, np.int64), seeds=np.zeros(1001, np.uint64))
    last = found.images.copy()
    last[-1] = 1
    assert images_digest(replace(found, images=last)) != images_digest(found)


def test_a_broken_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "synthetic archive").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ArtifactError, match="synthetic archive"):
        archive_digest(tmp_path / "synthetic archive")
