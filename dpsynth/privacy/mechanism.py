"""What touches private data: one frozen object gives the sampler its settings and the accountant its event.

Rules by which a mechanism keeps its meaning (the ledger stores it for years):
1. `event()` is a pure function of the fields; a field that changes the privacy loss is never given a new meaning.
2. A new kind gets a new `kind` string; an unknown kind is refused, never skipped.
3. Everything the training code needs to add noise, clip and sample is here, so it cannot use another number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from dpsynth.errors import LedgerError

if TYPE_CHECKING:
    import dp_accounting


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"Expected {name} > 0 and finite, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class GaussianQuery:
    """One noised sum over patients. Each patient adds a vector of L2 norm at most `clip_norm`.

    `share` is its part of the release's squared signal-to-noise ratio; the shares of a release sum to 1.
    """

    name: str
    share: float
    clip_norm: float

    def __post_init__(self) -> None:
        _positive(share=self.share, clip_norm=self.clip_norm)


@dataclass(frozen=True, kw_only=True)
class MomentRelease:
    """Adaptive composition of Gaussian sums that equals one Gaussian mechanism of `noise_multiplier`.

    Query i gets noise of standard deviation clip_norm_i * noise_multiplier / sqrt(share_i). In Gaussian DP mu^2 adds up
    (Dong, Roth, Su 2022, Corollary 3.3), so the whole is 1/noise_multiplier-GDP.
    """

    kind = "moment_release"
    noise_multiplier: float
    queries: tuple[GaussianQuery, ...]

    def __post_init__(self) -> None:
        _positive(noise_multiplier=self.noise_multiplier)
        total = sum(query.share for query in self.queries)
        if abs(total - 1) > 1e-9:
            raise ValueError(f"Expected the shares of the queries to sum to 1, got {total!r}.")

    def query(self, name: str) -> GaussianQuery:
        """The query of that name."""
        return next(query for query in self.queries if query.name == name)

    def query_noise_multiplier(self, name: str) -> float:
        """Noise standard deviation of one query divided by its clip norm."""
        return self.noise_multiplier / math.sqrt(self.query(name).share)

    def noise_stddev(self, name: str) -> float:
        """Noise standard deviation of each coordinate of one query's sum."""
        return self.query(name).clip_norm * self.query_noise_multiplier(name)

    def alone(self, name: str) -> MomentRelease:
        """One query as a release of its own, with the same noise: all of them composed are this release."""
        return MomentRelease(noise_multiplier=self.query_noise_multiplier(name), queries=(replace(self.query(name), share=1.0),))

    def event(self) -> dp_accounting.DpEvent:
        """The accounting event: the composition of the queries."""
        import dp_accounting as dpa

        return dpa.ComposedDpEvent([dpa.GaussianDpEvent(self.query_noise_multiplier(q.name)) for q in self.queries])


@dataclass(frozen=True, kw_only=True)
class PoissonDpSgd:
    """DP-SGD: each step draws every patient by an own coin, clips one gradient each, adds noise to the sum.

    The noise of a step has standard deviation clip_norm * noise_multiplier; the noised sum is divided by
    `expected_batch_size`, a public number. An empty batch still adds noise and counts. Abadi et al. 2016, Algorithm 1.
    """

    kind = "poisson_dp_sgd"
    noise_multiplier: float
    clip_norm: float
    sampling_probability: float
    steps: int
    declared_patients: int  # public; never the private count

    def __post_init__(self) -> None:
        _positive(
            noise_multiplier=self.noise_multiplier,
            clip_norm=self.clip_norm,
            sampling_probability=self.sampling_probability,
            declared_patients=self.declared_patients,
        )
        if self.sampling_probability > 1:
            raise ValueError(f"Expected sampling_probability <= 1, got {self.sampling_probability!r}.")
        if self.steps < 0:
            raise ValueError(f"Expected steps >= 0, got {self.steps!r}.")

    @property
    def noise_stddev(self) -> float:
        """Noise standard deviation of each coordinate of the summed gradient."""
        return self.clip_norm * self.noise_multiplier

    @property
    def expected_batch_size(self) -> float:
        """Public divisor of the noised gradient sum, in patients."""
        return self.sampling_probability * self.declared_patients

    def event(self) -> dp_accounting.DpEvent:
        """The accounting event: `steps` Poisson-sampled Gaussians."""
        import dp_accounting as dpa

        if self.steps == 0:
            return dpa.NoOpDpEvent()
        step = dpa.PoissonSampledDpEvent(self.sampling_probability, dpa.GaussianDpEvent(self.noise_multiplier))
        return dpa.SelfComposedDpEvent(step, self.steps)


@dataclass(frozen=True, kw_only=True)
class NonPrivate:
    """Training without a guarantee: epsilon is infinite wherever it is shown."""

    kind = "non_private"
    reason: str

    def event(self) -> dp_accounting.DpEvent:
        """The event that every accountant answers with infinity."""
        import dp_accounting as dpa

        return dpa.NonPrivateDpEvent()


Mechanism = MomentRelease | PoissonDpSgd | NonPrivate
_KINDS: dict[str, type[MomentRelease] | type[PoissonDpSgd] | type[NonPrivate]] = {
    cls.kind: cls for cls in (MomentRelease, PoissonDpSgd, NonPrivate)
}


def merged(mechanisms: Sequence[Mechanism]) -> tuple[Mechanism, ...]:
    """The same with as few as possible, as rounds of a federation leave them: DP-SGD that differs in steps alone as one, its steps added
    up, and releases one after the other as one, as long as no two of their queries have one name.
    """
    found: dict[PoissonDpSgd, int] = {}  # DP-SGD of one step, and how many
    releases: list[list[MomentRelease]] = []
    others: list[Mechanism] = []
    for mechanism in mechanisms:
        if isinstance(mechanism, PoissonDpSgd):
            step = replace(mechanism, steps=1)
            found[step] = found.get(step, 0) + mechanism.steps
        elif isinstance(mechanism, MomentRelease):
            names = {query.name for release in releases[-1] for query in release.queries} if releases else None
            if names is None or names & {query.name for query in mechanism.queries}:
                releases.append([])
            releases[-1].append(mechanism)
        else:
            others.append(mechanism)
    return (*others, *map(_as_one_release, releases), *(replace(step, steps=steps) for step, steps in found.items()))


def _as_one_release(releases: Sequence[MomentRelease]) -> MomentRelease:
    """Inverse of `MomentRelease.alone` for all queries: mu^2 adds up, and each query has its part of the sum."""
    if len(releases) == 1:
        return releases[0]
    parts = [(query, query.share / release.noise_multiplier**2) for release in releases for query in release.queries]
    total = sum(part for _, part in parts)
    queries = tuple(replace(query, share=part / total) for query, part in parts)
    return MomentRelease(noise_multiplier=total**-0.5, queries=queries)


def to_json(mechanism: Mechanism) -> dict[str, Any]:
    """Plain JSON value of a mechanism, for the ledger and the manifest."""
    return {"kind": mechanism.kind, **asdict(mechanism)}


def from_json(value: Mapping[str, Any]) -> Mechanism:
    """Inverse of `to_json`. Raises LedgerError for an unknown kind, a missing or a foreign field."""
    fields = dict(value)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise LedgerError(f"Expected a mechanism of kind {sorted(_KINDS)}, found {kind!r}.")
    if kind == MomentRelease.kind:
        fields["queries"] = tuple(GaussianQuery(**query) for query in fields.get("queries", ()))
    try:
        return _KINDS[kind](**fields)
    except (TypeError, ValueError) as error:
        raise LedgerError(f"The mechanism {kind!r} has wrong fields: {error}") from error
