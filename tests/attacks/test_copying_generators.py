"""Known-bad generators: each must be failed by name and refused by the gate; the honest one must not be accused.

Phantom patients go through the real preprocessing and split. The encoder and the classifier are left out where a test of pixels decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from cases import GOOD

from dpsynth.checks.copying import copying
from dpsynth.checks.evidence import Evidence, Features, compute_features
from dpsynth.checks.features import mirrored
from dpsynth.checks.membership import membership
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import DataConfig, GateConfig, PhantomConfig
from dpsynth.data.cohort import Float32
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.data.split import Split, split_patients
from dpsynth.model.thumbnails import thumbnails
from dpsynth.progress import silent
from dpsynth.release.gate import Refused, decide

GATE = GateConfig()
COUNT = 300


def patients(seed: int, number: int) -> DataConfig:
    return DataConfig(phantom=PhantomConfig(num_patients=number, max_images=2, seed=seed))


@dataclass(frozen=True)
class Site:
    """The hospital's patients, and images of other patients as an honest generator with perfect quality would draw them."""

    split: Split
    others: Float32

    def evidence(self, synthetic: Float32) -> Evidence:
        """What the checks would get."""
        return Evidence(
            synthetic=synthetic,
            synthetic_labels=np.zeros(len(synthetic), dtype=np.int64),
            training=self.split.training,
            control=self.split.control,
            selfcheck={},
            accounting_problems=(),
            ledger_problems=(),
            uses_sgd=False,
        )

    def judge(self, synthetic: Float32) -> Verdict:
        """The verdict of the check for copies, which sees pixels and needs no encoder."""
        none = np.empty((0, 1))
        features = Features(
            synthetic=none,
            training=none,
            control=none,
            synthetic_thumbnails=thumbnails(synthetic),
            mirrored_thumbnails=thumbnails(mirrored(synthetic)),
            training_thumbnails=thumbnails(self.split.training.images),
            control_thumbnails=thumbnails(self.split.control.images),
        )
        return copying(self.evidence(synthetic), features, GATE, rng=np.random.default_rng(2))


def make_site(seed: int) -> Site:
    config = patients(seed, 700)
    images = prepare(read_cohort(config), config, progress=silent)
    others = patients(seed + 1000, COUNT)
    drawn = prepare(read_cohort(others), others, progress=silent)
    return Site(split_patients(images, control_fraction=0.25, key=bytes([seed]) * 32), drawn.images[:COUNT])


@pytest.fixture(scope="module")
def site() -> Site:
    return make_site(3)


def returns_training_images(site: Site) -> Float32:
    return site.split.training.images[:COUNT]


def copies_a_tenth_of_the_patients(site: Site) -> Float32:
    """Every tenth training patient once, the rest honest."""
    training = site.split.training
    copied = training.images[[rows[0] for rows in training.rows_of()[::10]]]
    return np.concatenate([copied, site.others[len(copied) :]])


def copies_a_tenth_mirrored(site: Site) -> Float32:
    images = copies_a_tenth_of_the_patients(site)
    copied = len(site.split.training.rows_of()[::10])
    return np.concatenate([images[:copied, ..., ::-1], images[copied:]])


def copies_a_tenth_with_noise(site: Site) -> Float32:
    images = copies_a_tenth_of_the_patients(site)
    noise = 0.08 * np.random.default_rng(0).standard_normal(images.shape).astype(np.float32)
    return np.clip(images + noise, -1, 1)


def copies_a_tenth_brighter(site: Site) -> Float32:
    return np.clip(copies_a_tenth_of_the_patients(site) * 0.85 + 0.1, -1, 1)


def kernel_density(site: Site) -> Float32:
    """A memoriser: a random training image with a little noise, no two draws alike."""
    rng = np.random.default_rng(0)
    images = site.split.training.images[rng.integers(len(site.split.training.images), size=COUNT)]
    return np.clip(images + 0.05 * rng.standard_normal(images.shape), -1, 1).astype(np.float32)


BAD: tuple[Callable[[Site], Float32], ...] = (
    returns_training_images,
    copies_a_tenth_of_the_patients,
    copies_a_tenth_mirrored,
    copies_a_tenth_with_noise,
    copies_a_tenth_brighter,
    kernel_density,
)


@pytest.mark.parametrize("generator", BAD)
def test_a_copying_generator_fails_by_name(site: Site, generator: Callable[[Site], Float32]) -> None:
    verdict = site.judge(generator(site))
    assert verdict.outcome is Outcome.FAIL, verdict.reason
    assert "training patients are copied" in verdict.reason
    answer = decide(replace(GOOD, verdicts=tuple(verdict if known.check == "copying" else known for known in GOOD.verdicts)))
    assert isinstance(answer, Refused)
    assert [reason for reason in answer.reasons if "copying" in reason]


def test_the_honest_generator_is_not_accused(site: Site) -> None:
    verdict = site.judge(site.others)
    assert verdict.outcome is Outcome.PASS, verdict.reason


def test_one_copied_patient_is_shown_to_a_person(site: Site) -> None:
    """One copy cannot be told from chance by a count; the screening sends it to a reader."""
    synthetic = site.others.copy()
    synthetic[7] = site.split.training.images[0]
    assert site.judge(synthetic).outcome is Outcome.FLAG


@pytest.mark.parametrize(("generator", "outcome"), [(returns_training_images, Outcome.FAIL), (lambda site: site.others, Outcome.PASS)])
def test_membership_sees_training_images_and_accuses_nobody_else(
    site: Site, generator: Callable[[Site], Float32], outcome: Outcome
) -> None:
    evidence = site.evidence(generator(site))
    verdict = membership(compute_features(evidence, progress=silent), GATE, rng=np.random.default_rng(1))
    assert verdict.outcome is outcome, verdict.reason


@pytest.mark.slow
@pytest.mark.parametrize("generator", [*BAD, lambda site: site.others])
def test_twenty_hospitals(generator: Callable[[Site], Float32]) -> None:
    """Caught at 20 of 20 hospitals; the honest one accused at no more than one (at a false-alarm rate of 1 %, two happen once in 60)."""
    failed = sum(site.judge(generator(site)).outcome is Outcome.FAIL for site in map(make_site, range(10, 30)))
    assert failed == 20 if generator in BAD else failed <= 1
