"""The experiment on sites: who is where, and one tiny cell of its table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import partition
import pytest
import sites
from partition import Row, declared, sites_of, without_test

from dpsynth.privacy.accountant import epsilon_pld

ROWS = tuple(
    Row(file=f"{patient}-{image}.png", patient=f"p{patient}", label="abc"[patient % 3])
    for patient in range(600)
    for image in range(1 + patient % 2)
)


def patients(rows: tuple[Row, ...]) -> set[str]:
    return {row.patient for row in rows}


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_every_patient_is_at_one_site_with_all_images_and_none_is_in_the_test(number: int, skewed: bool) -> None:
    training, test = without_test(ROWS, 0)
    assert patients(training).isdisjoint(patients(test))
    assert len(patients(test)) == 120
    parts = sites_of(training, number, skewed=skewed, seed=0)
    assert len(parts) == number
    assert sorted(row.file for rows in parts for row in rows) == sorted(row.file for row in training)
    assert sum(len(patients(rows)) for rows in parts) == len(patients(training))
    assert min(len(patients(rows)) for rows in parts) >= partition.FEWEST
    assert parts == sites_of(training, number, skewed=skewed, seed=0)


def test_even_sites_have_equal_labels_and_skewed_ones_do_not() -> None:
    def spread(skewed: bool) -> float:
        shares = []
        for rows in sites_of(ROWS, 3, skewed=skewed, seed=1):
            labels = [row.label for row in rows]
            shares.append([labels.count(name) / len(labels) for name in "abc"])
        return float(np.ptp(shares, axis=0).max())

    assert spread(skewed=False) < 0.25
    assert spread(skewed=True) > 0.4


def test_declared_numbers_are_rounded() -> None:
    rows = [Row(file="", patient=str(number), label="a") for number in range(487)]
    assert declared(rows) == 490
    assert declared(rows[:87]) == 87


def test_a_tiny_cell_is_trained_tested_and_put_into_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("federated.outcome.prv_epsilon", epsilon_pld)  # as a second opinion, which takes seconds
    monkeypatch.setattr(sites, "utility", lambda images, labels, test, classes, seed: {"auc": float(np.random.default_rng(0).random())})
    setting = sites.Setting(data=None, work=tmp_path, side=12, channels=(8, 8), pretrain_steps=2, count=60, num_phantoms=60)
    cell = ("phantom-even-2", "together", 1.0, 0, 0)
    found = sites.one_run(setting, *cell)
    assert found["declared"] == [120, 120]
    assert 0.9 < found["epsilon"] <= 1
    assert 0 <= found["figures"]["phantom"]["auc"] <= 1
    name = sites.name_of(setting, *cell)
    assert name == "phantom-even-2/12 px/1/together/0.0"
    results = {name: found}
    for arm in ("pooled", "alone-0", "alone-1"):
        results[sites.name_of(setting, "phantom-even-2", arm, 1.0, 0, 0)] = {"figures": {"phantom": {"auc": 0.4 + 0.1 * len(arm)}}}
    (row,) = sites.table(results).splitlines()[2:]
    own = found["figures"]["phantom"]["auc"]
    assert row.split(" | ")[3:] == ["1.000", f"{own:.3f}", "1.100", f"{own - 1:.3f}", f"{own - 1.1:.3f} |"]
