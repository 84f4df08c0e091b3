"""From mechanisms to epsilon. PLD is claimed; RDP bounds it; a second accountant by other authors must agree.

PLD: Koskela et al. 2020, Doroshenko et al. 2022 (connect the dots), pessimistic rounding, so the epsilon is an upper bound.
RDP: Mironov 2017. All numbers are for add-or-remove-one neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dpsynth.privacy.mechanism import Mechanism, MomentRelease, NonPrivate, PoissonDpSgd, merged

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

FINE = 1e-4
COARSE = 1e-3
LARGEST_DISAGREEMENT = 0.02
# Below order 2 the sums for small noise do not converge and the library drops the order; the optimum never lies there at our settings.
_RDP_ORDERS = (*(2 + tenth / 10 for tenth in range(90)), *range(11, 64), 80, 128, 256, 512, 1024)

SecondOpinion = Callable[[Sequence[Mechanism], float], float]


def loss_distribution(mechanisms: Sequence[Mechanism], *, interval: float = FINE) -> PrivacyLossDistribution | None:
    """Composed privacy loss distribution; None when nothing touched the data. NonPrivate is refused with ValueError."""
    composed = None
    for mechanism in merged(mechanisms):
        part = _distribution(mechanism, interval)
        if part is not None:
            composed = part if composed is None else composed.compose(part)
    return composed


@lru_cache(maxsize=32)  # a run asks for the same few mechanisms a dozen times, and each answer takes up to a second
def _distribution(mechanism: Mechanism, interval: float) -> PrivacyLossDistribution | None:
    if isinstance(mechanism, MomentRelease):
        return _gaussian(mechanism.noise_multiplier, 1.0, interval)  # its queries compose to exactly this one
    if isinstance(mechanism, PoissonDpSgd):
        step = _gaussian(mechanism.noise_multiplier, mechanism.sampling_probability, interval)
        return step.self_compose(mechanism.steps) if mechanism.steps else None
    raise ValueError("A non-private mechanism has no privacy loss distribution.")


@lru_cache(maxsize=32)  # rounds of a federation differ in the number of steps alone
def _gaussian(noise: float, probability: float, interval: float) -> PrivacyLossDistribution:
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_gaussian_mechanism(noise, value_discretization_interval=interval, sampling_prob=probability, use_connect_dots=True)


def epsilon_pld(mechanisms: Sequence[Mechanism], delta: float, *, interval: float = FINE) -> float:
    """Smallest epsilon at `delta` by privacy loss distributions: 0 for nothing, infinity for anything non-private."""
    return _epsilon_pld(merged(mechanisms), delta, interval)  # so that rounds of one mechanism are asked for once, however they are cut


@lru_cache(maxsize=256)
def _epsilon_pld(mechanisms: tuple[Mechanism, ...], delta: float, interval: float) -> float:
    if any(isinstance(mechanism, NonPrivate) for mechanism in mechanisms):
        return math.inf
    composed = loss_distribution(mechanisms, interval=interval)
    return 0.0 if composed is None else float(composed.get_epsilon_for_delta(delta))


def epsilon_rdp(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Upper bound on epsilon by Renyi divergences."""
    if any(isinstance(mechanism, NonPrivate) for mechanism in mechanisms):
        return math.inf
    if not mechanisms:
        return 0.0
    from dp_accounting import ComposedDpEvent
    from dp_accounting.rdp import RdpAccountant

    return float(RdpAccountant(_RDP_ORDERS).compose(ComposedDpEvent([m.event() for m in mechanisms])).get_epsilon(delta))


def delta_curve(mechanisms: Sequence[Mechanism], epsilons: Sequence[float]) -> NDArray[np.float64]:
    """Delta at each epsilon, (len(epsilons),): the whole privacy profile, of which (epsilon, delta) is one point."""
    if any(isinstance(mechanism, NonPrivate) for mechanism in mechanisms):
        return np.ones(len(epsilons))
    composed = loss_distribution(mechanisms, interval=COARSE)
    if composed is None:
        return np.zeros(len(epsilons))
    return np.array([float(composed.get_delta_for_epsilon(epsilon)) for epsilon in epsilons])


def tpr_at_fpr(mechanisms: Sequence[Mechanism], fprs: Sequence[float]) -> NDArray[np.float64]:
    """Greatest true positive rate of any membership attack at each false positive rate, (len(fprs),).

    From the profile in both directions: TPR <= delta + e^eps FPR and 1 - FPR <= delta + e^eps (1 - TPR) for every epsilon
    (Dong, Roth, Su 2022, Proposition 2.13).
    """
    epsilons = np.concatenate([np.linspace(0, 5, 101), np.linspace(5.2, 60, 120)])
    deltas = delta_curve(mechanisms, epsilons.tolist())
    fpr = np.asarray(fprs, dtype=np.float64)[:, None]
    growth = np.exp(epsilons)[None, :]
    first = np.min(deltas + growth * fpr, axis=1)
    second = np.min(1 - (1 - deltas - fpr) / growth, axis=1)
    return np.asarray(np.clip(np.minimum(first, second), fpr[:, 0], 1.0))


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """What the accountants say of one list of mechanisms at one delta."""

    delta: float
    pld: float
    rdp: float
    second_opinion: float | None
    second_opinion_name: str

    def problems(self) -> tuple[str, ...]:
        """Why nothing may be claimed; empty when the accountants agree."""
        if not math.isfinite(self.pld):
            return ("epsilon is infinite: a step without privacy touched the data",)
        found = []
        if self.second_opinion is None:
            found.append(f"the second accountant ({self.second_opinion_name}) gave no number")
        elif not _within(self.second_opinion, self.pld, LARGEST_DISAGREEMENT):
            found.append(
                f"{self.second_opinion_name} says epsilon {self.second_opinion:.4g}, PLD says {self.pld:.4g}: they differ by more than 2 %"
            )
        if not self.rdp >= self.pld * (1 - LARGEST_DISAGREEMENT):
            found.append(f"the RDP bound {self.rdp:.4g} lies below the PLD value {self.pld:.4g}")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinity as the string "inf"."""
        return {name: "inf" if value == math.inf else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Accounting:
        """Inverse of `to_json`."""
        restored: dict[str, Any] = {name: math.inf if item == "inf" else item for name, item in value.items()}
        return cls(**restored)


def account(mechanisms: Sequence[Mechanism], delta: float, *, second_opinion: SecondOpinion | None, name: str = "Opacus PRV") -> Accounting:
    """Ask all accountants. Without `second_opinion` the result cannot carry a claim."""
    return Accounting(
        delta=delta,
        pld=epsilon_pld(mechanisms, delta),
        rdp=epsilon_rdp(mechanisms, delta),
        second_opinion=None if second_opinion is None else float(second_opinion(mechanisms, delta)),
        second_opinion_name=name,
    )


def _within(first: float, second: float, tolerance: float) -> bool:
    return math.isfinite(first) and abs(first - second) <= tolerance * max(first, second, 1e-3)
