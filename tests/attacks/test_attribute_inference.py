"""A generator that carries training patients' sex, site and finding with their images is failed by name; images alone, or values of
other people like them, are not this check's to accuse.

Phantom patients through the real preprocessing and split; thumbnails stand in both spaces, so that no encoder is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from cases import GOOD
from evidence_cases import evidence_of, features_of

from dpsynth.checks.attributes import attributes
from dpsynth.checks.family import decide_family, members
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import DataConfig, GateConfig, PhantomConfig
from dpsynth.data.cohort import Float32, ImageSet
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.data.split import Split, split_patients
from dpsynth.model.thumbnails import thumbnails
from dpsynth.progress import silent
from dpsynth.release.gate import Refused, decide

GATE = GateConfig(required=(*GateConfig().required, "attributes"))
ATTRIBUTES = {"sex": ["F", "M"], "site": ["A", "B"]}
COUNT = 200
Release = tuple[Float32, np.ndarray, dict[str, np.ndarray]]  # images, labels, values


def phantoms(seed: int, number: int) -> ImageSet:
    config = DataConfig(attributes=ATTRIBUTES, phantom=PhantomConfig(num_patients=number, max_images=1, seed=seed))  # type: ignore[arg-type]
    return prepare(read_cohort(config), config, progress=silent)


@dataclass(frozen=True)
class Site:
    """The hospital's patients, and as many other people as an honest generator draws."""

    split: Split
    others: ImageSet


@pytest.fixture(scope="module")
def site() -> Site:
    return Site(split_patients(phantoms(5, 420), control_fraction=0.3, key=b"a" * 32), phantoms(1005, COUNT))


def rows_of(images: ImageSet, rows: np.ndarray, *, blur: float = 0.0) -> Release:
    rng = np.random.default_rng(1)
    pictures = np.clip(images.images[rows] + blur * rng.standard_normal(images.images[rows].shape), -1, 1).astype(np.float32)
    return pictures, images.labels[rows], {name: np.array([images.attributes[row][name] for row in rows]) for name in ATTRIBUTES}


def honest(site: Site) -> Release:
    return rows_of(site.others, np.arange(COUNT))


def copies_with_values(site: Site) -> Release:
    return rows_of(site.split.training, np.random.default_rng(0).integers(len(site.split.training.images), size=COUNT), blur=0.15)


def averages_of_two_with_the_values_of_one(site: Site) -> Release:
    """No image is a copy, yet each is half of a training patient, with that patient's values."""
    rows = np.random.default_rng(0).permutation(len(site.split.training.images))[:COUNT]
    images, labels, values = rows_of(site.split.training, rows)
    return ((0.7 * images + 0.3 * np.roll(images, 1, axis=0)).astype(np.float32), labels, values)


def copies_with_values_of_others(site: Site) -> Release:
    images, labels, values = copies_with_values(site)
    rng = np.random.default_rng(2)
    return images, rng.permutation(labels), {name: rng.permutation(value) for name, value in values.items()}


def judge(site: Site, release: Release) -> Verdict:
    images, labels, values = release
    sets = evidence_of(site.split.training, site.split.control, images, labels, in_pool=site.split.in_pool, uses_sgd=False)
    rows = [thumbnails(side) for side in (images, site.split.training.images, site.split.control.images)]
    features = features_of(rows[0], rows[1], rows[2], site.split.in_pool)
    found = attributes(replace(sets, synthetic_attributes=values), features, GATE, rng=np.random.default_rng(8))
    return decide_family([found], GATE.family_error, family=members(GATE.required))[0]


@pytest.mark.parametrize("attack", [copies_with_values, averages_of_two_with_the_values_of_one])
def test_values_that_come_with_training_images_fail_by_name(site: Site, attack: Callable[[Site], Release]) -> None:
    verdict = judge(site, attack(site))
    assert verdict.outcome is Outcome.FAIL, verdict.reason
    assert "the images tell more about patients who were trained on" in verdict.reason
    answer = decide(replace(GOOD, verdicts=(*GOOD.verdicts, verdict), required=GATE.required))
    assert isinstance(answer, Refused)
    assert "attributes: fail" in answer.reasons


@pytest.mark.parametrize("attack", [honest, copies_with_values_of_others])
def test_what_tells_nothing_about_the_patients_values_is_not_accused(site: Site, attack: Callable[[Site], Release]) -> None:
    verdict = judge(site, attack(site))
    assert verdict.outcome is Outcome.PASS, verdict.reason
