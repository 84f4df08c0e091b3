"""Patients as points of a mixture, a hospital of them, and the generators that are planted or honest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsynth.data.cohort import ImageSet

Array = NDArray[np.float64]
WIDTH = 16
CENTRES = np.random.default_rng(12345).normal(0, 1, (8, WIDTH))  # eight kinds of patient


@dataclass(frozen=True)
class People:
    """points (n, width); values (n, 3): label of two, sex of two, site of four, of which the points tell nothing."""

    points: Array
    values: NDArray[np.int64]

    @classmethod
    def drawn(cls, count: int, rng: np.random.Generator) -> People:
        """New people."""
        points = CENTRES[rng.integers(len(CENTRES), size=count)] + rng.normal(0, 1, (count, WIDTH))
        return cls(points, rng.integers(0, (2, 2, 4), (count, 3)))

    def at(self, rows: NDArray[Any], *, noise: float, rng: np.random.Generator) -> Array:
        """Their points with noise."""
        return np.asarray(self.points[rows] + rng.normal(0, noise, (len(rows), WIDTH)))

    def of(self, rows: NDArray[Any]) -> People:
        """Some of them, as they are."""
        return People(self.points[rows], self.values[rows])

    def instead(self, points: Array) -> People:
        """These points in place of the first ones; values stay, so that nobody's come along."""
        return People(np.concatenate([points, self.points[len(points) :]]), self.values)

    def images(self, prefix: str) -> ImageSet:
        """One empty image each, with label, sex and site."""
        count = len(self.points)
        return ImageSet(
            images=np.zeros((count, 1, 1, 1), dtype=np.float32),
            labels=self.values[:, 0],
            patients=np.arange(count),
            patient_ids=tuple(f"{prefix}{number}" for number in range(count)),
            classes=("a", "b"),
            attributes=tuple({"sex": "FM"[sex], "site": "ABCD"[site]} for _, sex, site in self.values),
        )


@dataclass(frozen=True)
class Hospital:
    """Training and control patients; in_pool: which of the training patients are in the pool."""

    training: People
    control: People
    in_pool: NDArray[np.bool_]

    @classmethod
    def drawn(cls, pool: int, rng: np.random.Generator) -> Hospital:
        """About `pool` patients with coins, and half as many without."""
        always, all_ = pool // 2, People.drawn(pool // 2 + pool, rng)
        inside = np.concatenate([np.ones(always, dtype=bool), rng.random(pool) < 0.5])
        return cls(all_.of(inside), all_.of(~inside), np.arange(int(inside.sum())) >= always)


def copies(share: float) -> Callable[[Hospital, int, np.random.Generator], People]:
    """This share of the training patients once each, with a little noise, the rest honest."""

    def generate(hospital: Hospital, count: int, rng: np.random.Generator) -> People:
        patients = len(hospital.training.points)
        chosen = rng.permutation(patients)[: round(share * patients)]
        return People.drawn(count, rng).instead(hospital.training.at(chosen, noise=0.05, rng=rng))

    return generate


def kernel(hospital: Hospital, count: int, rng: np.random.Generator) -> People:
    """A memoriser: training points with noise nearly as wide as a kind of patient, values by coins."""
    rows = rng.integers(len(hospital.training.points), size=count)
    return People.drawn(count, rng).instead(hospital.training.at(rows, noise=0.7, rng=rng))


def kernel_with_values(hospital: Hospital, count: int, rng: np.random.Generator) -> People:
    """The same, and every point carries label, sex and site of its patient."""
    rows = rng.integers(len(hospital.training.points), size=count)
    return People(hospital.training.at(rows, noise=0.7, rng=rng), hospital.training.values[rows])


def subgroup(hospital: Hospital, count: int, rng: np.random.Generator) -> People:
    """A quarter of the points from the training patients of one site, with as much noise as the memoriser's; the rest honest."""
    theirs = np.flatnonzero(hospital.training.values[:, 2] == 0)
    rows = theirs[rng.integers(len(theirs), size=count // 4)]
    return People.drawn(count, rng).instead(hospital.training.at(rows, noise=0.7, rng=rng))


def leaked(hospital: Hospital, count: int, rng: np.random.Generator) -> People:
    """Trained on the whole pool, and it copies a tenth of everybody: no comparison of the two sides can see it."""
    everybody = np.concatenate([hospital.training.points, hospital.control.points])
    chosen = rng.permutation(len(everybody))[: len(everybody) // 10]
    return People.drawn(count, rng).instead(everybody[chosen] + rng.normal(0, 0.05, (len(chosen), WIDTH)))


def smooth(_: Hospital, count: int, rng: np.random.Generator) -> People:
    """Honest and less varied than real patients, as most generators are."""
    return People.drawn(count, rng).instead(CENTRES[rng.integers(len(CENTRES), size=count)] + rng.normal(0, 0.6, (count, WIDTH)))


def honest(_: Hospital, count: int, rng: np.random.Generator) -> People:
    """New people."""
    return People.drawn(count, rng)


NULL = {"honest": honest, "honest, smoother than real": smooth}
PLANTED = {
    "1 % of patients copied": copies(0.01),
    "5 % of patients copied": copies(0.05),
    "10 % of patients copied": copies(0.1),
    "20 % of patients copied": copies(0.2),
    "noisy memoriser": kernel,
    "noisy memoriser with their values": kernel_with_values,
    "one subgroup memorised": subgroup,
    "control set leaked, 10 % copied": leaked,
}
