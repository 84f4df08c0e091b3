"""What a configuration will spend and cost, from public numbers alone: no image is touched and torch is not loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from dpsynth import policy_needs
from dpsynth.cells import FEWEST_PATIENTS
from dpsynth.config import Config, GateConfig, packing, resolved
from dpsynth.expectations import Expectation, Expectations, load_expectations
from dpsynth.privacy.accountant import COARSE, epsilon_pld, epsilon_rdp, tpr_at_fpr
from dpsynth.privacy.calibrate import plan_mechanisms, resolve_delta
from dpsynth.privacy.mechanism import GaussianQuery, Mechanism, MomentRelease, NonPrivate, PoissonDpSgd, to_json

# One row (a patient's image with one noise draw) through the default U-Net at 28x28, forward and per-patient backward, measured on
# one 2-core machine; other sizes are scaled by the net's positions and by the square of its channels. An estimate, not a promise.
_SECONDS_PER_ROW = 0.004
_SECONDS_PER_PUBLIC_ROW = 0.003
_REFERENCE_POSITIONS = 14 * 14
_CROP_POSITIONS = {2: 16**2, 3: 8**3}  # of the pieces that an enlarger learns from, by dimensions
_REFERENCE_CHANNELS = 32 * 32 + 64 * 64
_REFERENCE_BYTES_PER_PATIENT = 12e6  # activations of all rows and one gradient
FEWEST_CONTROL = 60  # below about this many the checks of membership, copying and fidelity are inconclusive
FEWEST_OF_GROUPS = 120  # and below about this many that of groups, whose largest groups are about half of the pool
_CURVE = (1.0, 3.0, 10.0)  # epsilons that a plan tells about beside its own
_BASE_BYTES = 6e8  # interpreter, torch, libraries


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that can be known before the data is opened. Times in seconds on 2 cores, memory in bytes."""

    epsilon: float
    delta: float
    unit: str
    mechanisms: tuple[Mechanism, ...]
    epsilon_pld: float
    epsilon_rdp: float
    attack_rates: tuple[tuple[float, float], ...]  # (false positive rate, greatest true positive rate)
    steps: int
    trainable: str  # what DP-SGD trains
    finer: str  # what of the images no patient teaches; empty when patients teach all
    expected_batch: float
    expected_control: float
    fewest_control: int
    attributes: tuple[str, ...]
    cells: int
    patients_per_cell: float  # of training, on average
    seconds: float
    memory_bytes: float
    expected: tuple[Expectation, ...]  # at the run's epsilon, then at others; empty where nothing was measured
    expected_of_real: Expectation  # the same figures of real images
    missing: str  # what the policy needs and this machine lacks; empty when nothing
    warnings: tuple[str, ...]  # why nothing may come of it, or less than one hopes

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--format json`; infinity becomes the string "inf"."""
        values: dict[str, Any] = {
            **self.__dict__,
            "mechanisms": [to_json(mechanism) for mechanism in self.mechanisms],
            "expected": [expectation.figures() for expectation in self.expected],
            "expected_of_real": self.expected_of_real.figures(),
        }
        return {name: "inf" if value == math.inf else value for name, value in values.items()}


def plan(config: Config) -> Plan:
    """Calibrate the mechanisms of `config` and estimate time and memory. Raises ConfigError when the budget cannot be met."""
    config = resolved(config)
    delta = resolve_delta(config.privacy.delta, config.data.declared_patients)
    mechanisms = planned_mechanisms(config, delta=delta)
    fprs = (0.001, 0.01, 0.1)
    rates = tpr_at_fpr(mechanisms, fprs)
    sgd = next((m for m in mechanisms if isinstance(m, PoissonDpSgd)), None)
    table = load_expectations()
    fewest = fewest_control(config.gate)
    control = config.data.declared_patients * config.data.control_fraction
    per_cell = config.data.declared_patients * (1 - config.data.control_fraction) / len(config.data.cells)
    missing = policy_needs.missing(config.gate)
    return Plan(
        epsilon=math.inf if config.privacy.unsafe_non_private else config.privacy.epsilon,
        delta=delta,
        unit=config.data.unit.value,
        mechanisms=mechanisms,
        epsilon_pld=epsilon_pld(mechanisms, delta, interval=COARSE),
        epsilon_rdp=epsilon_rdp(mechanisms, delta),
        attack_rates=tuple((fpr, float(tpr)) for fpr, tpr in zip(fprs, rates, strict=True)),
        steps=sgd.steps if sgd else 0,
        trainable=config.diffusion.trainable if sgd else "none",
        finer=config.finer_than_learnt,
        expected_batch=sgd.expected_batch_size if sgd else 0.0,
        expected_control=control,
        fewest_control=fewest,
        attributes=tuple(config.data.attributes),
        cells=len(config.data.cells),
        patients_per_cell=per_cell,
        seconds=_seconds(config, sgd),
        memory_bytes=_memory(config),
        expected=_expected(config, table, delta),
        expected_of_real=table.real,
        missing=missing,
        warnings=tuple(_warnings(config, control=control, fewest=fewest, per_cell=per_cell, missing=missing)),
    )


def fewest_control(gate: GateConfig) -> int:
    """Control patients below which the checks that are required cannot decide."""
    return FEWEST_OF_GROUPS if "groups" in gate.required else FEWEST_CONTROL


def _warnings(config: Config, *, control: float, fewest: int, per_cell: float, missing: str) -> list[str]:
    found = []
    if control < fewest:
        found.append(f"about {control:.0f} control patients; below {fewest} the checks cannot tell and nothing is released")
    if missing:
        found.append(f"no run can be checked or released here, and `train` will refuse: {missing}")
    if config.data.attributes and per_cell < FEWEST_PATIENTS:
        found.append(
            f"cells of fewer than {FEWEST_PATIENTS} patients mostly show what their label has in common; merge values, bands or classes"
        )
    if config.method == "moments" and "fidelity" in config.gate.required:
        found.append(
            "images of method moments are smooth, so that the required check of fidelity stops most releases of them (docs/checks.md); "
            "choose method diffusion, or leave fidelity out of gate.required"
        )
    return found


def _expected(config: Config, table: Expectations, delta: float) -> tuple[Expectation, ...]:
    """Measured were images of two dimensions by the diffusion method."""
    if config.method != "diffusion" or len(config.data.spatial_shape) == 3 or config.privacy.unsafe_non_private:
        return ()
    patients = config.data.declared_patients * (1 - config.data.control_fraction)
    epsilons = (config.privacy.epsilon, *(epsilon for epsilon in _CURVE if epsilon != config.privacy.epsilon))
    return tuple(table.at(patients=patients, epsilon=epsilon, delta=delta) for epsilon in epsilons)


VOTES = GaussianQuery(name="votes", share=1.0, clip_norm=1.0)  # a patient has one vote, whatever and however many their images are

# Noise multipliers do not depend on clip norms, so a plan needs none of the public constants that set the real ones.
_UNIT_QUERIES = (GaussianQuery(name="moments", share=1.0, clip_norm=1.0),)


def planned_mechanisms(
    config: Config, *, delta: float, queries: tuple[GaussianQuery, ...] = _UNIT_QUERIES, interval: float = COARSE
) -> tuple[Mechanism, ...]:
    """The mechanisms of a run of `config`; `interval` is the grid on which the accountant has the last word."""
    config = resolved(config)
    if config.privacy.unsafe_non_private:
        return (NonPrivate(reason="privacy.unsafe_non_private is set"),)
    diffusion, share = config.diffusion, config.moments.share
    if config.method == "diffusion" and config.votes.share > 0:
        share += config.votes.share
        moments = tuple(replace(query, share=query.share * config.moments.share / share) for query in queries)
        queries = (*moments, replace(VOTES, share=config.votes.share / share))
    return plan_mechanisms(
        epsilon=config.privacy.epsilon,
        delta=delta,
        method=config.method,
        moments_share=share,
        queries=queries,
        clip_norm=diffusion.clip_norm,
        sampling_probability=diffusion.sampling_probability,
        steps=0 if diffusion.trainable == "none" else diffusion.steps,
        declared_patients=config.data.declared_patients,
        interval=interval,
    )


def describe(plan_: Plan) -> list[tuple[str, str]]:
    """Rows of (what, value) for people."""
    rows = [
        ("guarantee", f"epsilon {plan_.epsilon:g} at delta {plan_.delta:.3g}, per {plan_.unit}, add or remove one"),
        ("accountants", f"PLD {plan_.epsilon_pld:.3f} (claimed), RDP {plan_.epsilon_rdp:.3f} (upper bound)"),
    ]
    rows += [_describe_mechanism(mechanism) for mechanism in plan_.mechanisms]
    if plan_.steps:
        rows.append(("trained with privacy", {"all": "all weights", "small": "biases, norms, class embedding and output"}[plan_.trainable]))
    for fpr, tpr in plan_.attack_rates:
        rows.append(
            (
                "what epsilon means",
                f"a test that wrongly accuses {fpr:.1%} of non-participants finds at most {tpr:.1%} of participants",
            )
        )
    if plan_.finer:
        rows.append(("from public images alone", plan_.finer))
    if plan_.attributes:
        names = ", ".join(("label", *plan_.attributes))
        rows.append(("cells", f"{plan_.cells} of {names}; on average {plan_.patients_per_cell:.0f} training patients each"))
    rows += [("warning", text) for text in plan_.warnings]
    rows += _describe_expected(plan_)
    rows.append(("time", f"about {plan_.seconds / 60:.1f} minutes on 2 cores (estimate)"))
    rows.append(("memory", f"about {plan_.memory_bytes / 2**30:.1f} GiB (estimate)"))
    return rows


def _describe_expected(plan_: Plan) -> list[tuple[str, str]]:
    if not plan_.expected:
        return []
    own, *others = plan_.expected
    real = plan_.expected_of_real
    text = (
        f"label AUC {own.auc:.2f} (real images {real.auc:.2f}), precision {own.precision:.2f} ({real.precision:.2f}), "
        f"coverage {own.coverage:.2f} ({real.coverage:.2f}), as procedural images of 28 px gave; yours will differ"
    )
    curve = "; ".join(f"epsilon {e.epsilon:g}: {e.auc:.2f}, {e.precision:.2f}, {e.coverage:.2f}" for e in others)
    return [("expect", text), ("expect otherwise", curve)]


def _describe_mechanism(mechanism: Mechanism) -> tuple[str, str]:
    if isinstance(mechanism, MomentRelease):
        return ("moments", f"one Gaussian release, noise multiplier {mechanism.noise_multiplier:.3f}")
    if isinstance(mechanism, PoissonDpSgd):
        text = (
            f"{mechanism.steps} steps, noise multiplier {mechanism.noise_multiplier:.3f}, clip norm {mechanism.clip_norm:g}, "
            f"sampling probability {mechanism.sampling_probability:g}, {mechanism.expected_batch_size:.0f} expected per step"
        )
        return ("DP-SGD", text)
    return ("no privacy", f"{mechanism.reason}: epsilon is infinite, nothing may be released")


def _scale(config: Config) -> float:
    shape = config.learnt_shape
    positions = math.prod(side / packing(shape) for side in shape) / _REFERENCE_POSITIONS
    channels = sum(c * c for c in config.diffusion.channels) / _REFERENCE_CHANNELS
    kernel = 3.0 if len(shape) == 3 else 1.0
    return positions * max(channels, 0.25) * kernel


def _seconds(config: Config, sgd: PoissonDpSgd | None) -> float:
    overhead = 30.0
    if config.method == "moments":
        return overhead
    public = config.pretrain.steps * config.pretrain.rows_per_step(len(config.data.spatial_shape)) * _SECONDS_PER_PUBLIC_ROW
    private = sgd.steps * sgd.expected_batch_size * config.diffusion.draws * _SECONDS_PER_ROW if sgd else 0.0
    enlargers = config.halvings * public * _CROP_POSITIONS[len(config.data.spatial_shape)] / _REFERENCE_POSITIONS
    return overhead + (public + private) * _scale(config) + enlargers


def _memory(config: Config) -> float:
    images = 4.0 * config.data.declared_patients * math.prod(config.data.spatial_shape) * config.data.channels
    patients = config.diffusion.patients_per_chunk * config.diffusion.draws / 4
    return _BASE_BYTES + 3 * images + patients * _REFERENCE_BYTES_PER_PATIENT * _scale(config)
