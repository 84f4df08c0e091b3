"""The digest that ties a ledger to its data: any change of the data changes it, the order of files does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from dpsynth.config import DataConfig
from dpsynth.data.cohort import Cohort
from dpsynth.data.fingerprint import fingerprint, open_ledger
from dpsynth.data.source import read_cohort
from dpsynth.errors import DataError
from dpsynth.progress import silent

SALT = b"salt of sixteen."


def digest(cohort: Cohort, *, salt: bytes = SALT) -> str:
    return fingerprint(cohort, DataConfig(), salt=salt, progress=silent)


def test_the_order_of_files_does_not_matter(raster: tuple[Path, DataConfig]) -> None:
    cohort = read_cohort(raster[1])
    assert digest(cohort) == digest(dataclasses.replace(cohort, records=cohort.records[::-1]))
    assert digest(cohort) == digest(read_cohort(raster[1]))


def test_the_salt_matters(raster: tuple[Path, DataConfig]) -> None:
    cohort = read_cohort(raster[1])
    assert digest(cohort) != digest(cohort, salt=b"another")


def one_grey_level(folder: Path) -> None:
    with Pillow.open(folder / "i03.png") as picture:
        pixels = np.array(picture)
    pixels[5, 5] ^= 1
    Pillow.fromarray(pixels).save(folder / "i03.png")


def edit(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "table.csv").write_text((folder / "table.csv").read_text().replace(old, new)) and None


def swap_two_images(folder: Path) -> None:
    content = (folder / "i03.png").read_bytes()
    (folder / "i03.png").write_bytes((folder / "i05.png").read_bytes())
    (folder / "i05.png").write_bytes(content)


def drop_one(folder: Path) -> None:
    (folder / "i03.png").unlink()
    edit("i03.png,P03,lesion,F\n", "")(folder)


@pytest.mark.parametrize(
    "change",
    [
        one_grey_level,
        edit("P03,lesion", "P03,normal"),
        edit(",P03,", ",P05,"),
        edit(",P03,", ",P03b,"),
        swap_two_images,
        drop_one,
    ],
)
def test_any_change_of_the_data_matters(raster: tuple[Path, DataConfig], change: Callable[[Path], None]) -> None:
    folder, config = raster
    before = digest(read_cohort(config))
    change(folder)
    assert digest(read_cohort(config)) != before


def test_the_same_pixels_in_a_new_file_are_the_same_data(raster: tuple[Path, DataConfig]) -> None:
    folder, config = raster
    before = digest(read_cohort(config))
    with Pillow.open(folder / "i03.png") as picture:
        picture.save(folder / "i03.png", compress_level=1)
    assert digest(read_cohort(config)) == before


def test_no_ledger_is_opened_for_a_broken_data_set(raster: tuple[Path, DataConfig], tmp_path: Path) -> None:
    from dpsynth.config import Config

    (raster[0] / "i03.png").write_bytes(b"")
    ledger = tmp_path / "x.ledger.jsonl"
    config = Config(data=raster[1])
    with pytest.raises(DataError, match=r"i03\.png"):
        open_ledger(config, path=ledger, epsilon=1.0, delta=None, max_gate_attempts=3, progress=silent)
    assert not ledger.exists()
