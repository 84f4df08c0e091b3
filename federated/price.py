"""What it costs that each site adds its own noise, beside a group that trusts one guard and pools its images there. Public numbers alone.

At one epsilon both use one noise multiplier z. A site of n / K patients divides noise of z * clip by its own batch, so the mean over K
sites carries sqrt(K) times the noise of the pooled batch of n; where weights are declared, sites are taken to be as large as their weights.
For the moments, K noises of one size are added where the pooled sum carries one, which is the same factor.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from dpsynth.privacy.accountant import COARSE, epsilon_pld
from dpsynth.privacy.mechanism import MomentRelease, PoissonDpSgd
from federated.federation import Federation, planned


@dataclass(frozen=True, kw_only=True)
class Price:
    """Both schemes side by side. Noise is the standard deviation on the mean gradient, in clip norms."""

    sites: int
    delta: float
    epsilon: float  # of a patient of one site, in both schemes
    epsilon_at_all_sites: float  # of a patient of every site, with local noise; pooled, they are one patient
    local_noise: float | None  # None where nothing is trained
    pooled_noise: float | None
    pooled_epsilon_for_local_noise: float  # what one guard would spend for noise as large as that of the sites
    local_epsilon_for_pooled_noise: float  # what each site would spend for noise as small as that of one guard

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def price(release: MomentRelease, sgd: PoissonDpSgd | None, *, sites: int, patients: int, delta: float) -> Price:
    """The price for so many sites with `patients` together; `release` and `sgd` are a study's mechanisms at every site."""
    pooled_noise = None if sgd is None else sgd.noise_multiplier / (sgd.sampling_probability * patients)

    def epsilon(factor: float, times: int = 1) -> float:
        """Of both mechanisms with the noise times `factor`, composed `times` times."""
        noisier = [replace(mechanism, noise_multiplier=mechanism.noise_multiplier * factor) for mechanism in (release, sgd) if mechanism]
        return epsilon_pld(noisier * times, delta, interval=COARSE)

    more = math.sqrt(sites)
    return Price(
        sites=sites,
        delta=delta,
        epsilon=epsilon(1.0),
        epsilon_at_all_sites=epsilon(1.0, sites),
        local_noise=None if pooled_noise is None else more * pooled_noise,
        pooled_noise=pooled_noise,
        pooled_epsilon_for_local_noise=epsilon(more),
        local_epsilon_for_pooled_noise=epsilon(1 / more),
    )


def price_of(federation: Federation) -> Price:
    """The price of a study. Raises ConfigError."""
    release, sgd = planned(federation)
    sites = len(set(federation.sites) - set(federation.left_out))
    return price(release, sgd, sites=sites, patients=federation.config.data.declared_patients, delta=federation.delta)


def describe(found: Price) -> list[str]:
    """Lines for people."""
    more = f"{math.sqrt(found.sites):.2f} times as much"
    noise = f"Noise on the sums of the moments at the sites beside one guard: {more}."
    if found.local_noise is not None and found.pooled_noise is not None:
        noise = (
            f"Noise on the mean gradient, in clip norms: {found.local_noise:.3g} at the sites, {found.pooled_noise:.3g} under one guard, "
            f"{more}; so it is on the sums of the moments."
        )
    return [
        f"{found.sites} sites, each with its own noise: epsilon {found.epsilon:.2f} at delta {found.delta:.3g} for a patient of one, "
        f"{found.epsilon_at_all_sites:.2f} for a patient of all.",
        f"The same departments under one guard that all trust: epsilon {found.epsilon:.2f} for every patient.",
        noise,
        f"At equal noise: the sites' noise would cost one guard epsilon {found.pooled_epsilon_for_local_noise:.2f}; the guard's noise "
        f"would cost each site {found.local_epsilon_for_pooled_noise:.2f}.",
    ]
