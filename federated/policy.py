"""What a hospital allows, in a file that the hospital owns. The guard reads it once, at its start; nothing in a message can change it.

The budget itself stands in the ledger's first line and covers every run on the data, local ones too; the policy repeats it, so that a
guard with the wrong ledger does not start, and says besides how much of it a single study may take.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from datetime import datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpsynth.config import (
    CheckName,
    Config,
    DataConfig,
    DiffusionConfig,
    GateConfig,
    MomentsConfig,
    PretrainConfig,
    PrivacyConfig,
    ReleaseConfig,
    policy_problem,
    with_absolute_encoder,
    wrong_settings,
    yaml_mapping,
)
from dpsynth.data.fingerprint import open_ledger
from dpsynth.errors import ConfigError, LedgerError
from dpsynth.privacy.ledger import Ledger
from dpsynth.progress import Progress
from dpsynth.signing import load_public
from federated.journal import LOST, Journal
from federated.messages import Code, Digest, Name, Plan

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(gt=0, le=1)]
Clock = Annotated[str, Field(pattern="^([01][0-9]|2[0-3]):[0-5][0-9]$")]
End = Annotated[str, Field(pattern="^(([01][0-9]|2[0-3]):[0-5][0-9]|24:00)$")]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
_DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class OpeningHours(_Settings):
    """A span of local time on some days. A span that ends before it begins runs past midnight and belongs to the day it began on."""

    days: tuple[Day, ...] = Field(_DAYS, min_length=1, description="Days of the week.")
    start: Clock = Field("00:00", description="Local time at which it begins.")
    end: End = Field("24:00", description="Local time at which it ends; 24:00 is midnight.")

    def holds(self, now: datetime) -> bool:
        """Whether `now` (local time) lies in the span."""
        clock, day = now.time(), now.weekday()
        begins, ends = time.fromisoformat(self.start), time.max if self.end == "24:00" else time.fromisoformat(self.end)
        if begins <= ends:
            return _DAYS[day] in self.days and begins <= clock < ends
        return (_DAYS[day] in self.days and clock >= begins) or (_DAYS[day - 1] in self.days and clock < ends)


class SitePolicy(_Settings):
    """One hospital's rules. Paths are relative to the policy file."""

    site: Name = Field(description="The site's name in the federation.")
    data: DataConfig = Field(description="The data set, as in a configuration of dpsynth.")
    ledger: Path = Field(description="Ledger of the data set; local runs use the same one.")
    state: Path = Field(description="Folder of the guard: keys of open rounds, answers that were given, splits.")
    socket: Path = Field(description="Unix socket at which the guard listens.")
    coordinators: tuple[Path, ...] = Field(min_length=1, description="Public keys (signing.pub) of the coordinators that may ask.")
    apps: tuple[Digest, ...] = Field((), description="SHA-256 of the apps that a plan may name; empty: any, since the app is not trusted.")
    epsilon: Positive = Field(description="The budget, as in the ledger's first line.")
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(description="Delta at which it is counted, as in the ledger's first line.")
    study_epsilon: Positive = Field(description="Largest epsilon that one study may spend here.")
    smallest_noise_multiplier: Positive = Field(0.5, description="Of DP-SGD.")
    smallest_moments_noise_multiplier: Positive = Field(0.5, description="Of the moments.")
    largest_clip_norm: Positive = Field(1.0, description="Of one patient's gradient.")
    sampling_probability: tuple[Probability, Probability] = Field((0.001, 0.2), description="Smallest and largest.")
    largest_steps_per_round: Count = Field(100, description="DP-SGD steps in one round.")
    largest_steps: Count = Field(2000, description="DP-SGD steps of one study.")
    largest_rounds: Count = Field(500, description="Number that no round of a study may pass.")
    models: tuple[tuple[Count, ...], ...] = Field(((32, 64),), min_length=1, description="Channels of the nets that may be trained.")
    largest_draws: Count = Field(4, description="Noise draws per patient and step.")
    largest_learning_rate: Positive = Field(0.01, description="Of Adam.")
    largest_low_frequencies: Count = Field(16, description="Of the moments, per axis.")
    largest_num_phantoms: Count = Field(5000, description="Procedural images from which public constants are computed.")
    hours: tuple[OpeningHours, ...] = Field((), description="When rounds may begin; empty: always.")
    largest_message_bytes: Count = Field(256 << 20, description="Of one message.")
    gate: GateConfig = Field(
        GateConfig(),
        description="By which candidates of a study are approved, as `gate` in a configuration of dpsynth ([config.md](config.md)).",
    )
    public_checks: tuple[CheckName, ...] = Field(
        (),
        description="Checks whose outcome, one word, stands in the signed statement; by default approved or refused is all that leaves.",
    )
    studies: Count = Field(20, description="Studies that may come as far as a charge; further ones are refused.")
    reply_grid_seconds: Annotated[float, Field(ge=0, le=3600)] = Field(
        5.0,
        description="Answers leave at multiples of this time after the guard turned to the question, so that their time tells less; "
        "0: at once.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> SitePolicy:
        if self.sampling_probability[0] > self.sampling_probability[1]:
            raise ValueError("sampling_probability: the smallest must not be above the largest")
        if self.study_epsilon > self.epsilon:
            raise ValueError("study_epsilon is larger than epsilon")
        if problem := policy_problem(self.gate, self.data):
            raise ValueError(problem)
        for name, checks in (("gate.required", self.gate.required), ("public_checks", self.public_checks)):
            if "white_box" in checks:
                raise ValueError(f"{name}: white_box looks at weights, which no site of a federation holds. Leave it out")
        return self

    def coordinator_keys(self) -> tuple[Ed25519PublicKey, ...]:
        """The keys of the approved coordinators. Raises SignatureError."""
        return tuple(load_public(path) for path in self.coordinators)


def load_policy(path: Path) -> SitePolicy:
    """Read a policy. Raises ConfigError with the path of every wrong key, and for a file that others may write."""
    try:
        text, mode = path.read_text(encoding="utf-8"), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Expected a readable policy at {path}: {getattr(error, 'strerror', None) or error}.") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"The policy {path.name} can be written by others than its owner. Run: chmod go-w {path}")
    try:
        policy = SitePolicy.model_validate(yaml_mapping(text))
    except ValidationError as error:
        raise ConfigError(f"Wrong policy: {wrong_settings(error)}. docs/site.md lists every setting.") from error
    return _with_absolute_paths(policy, path.resolve().parent)


def own_file(path: Path) -> bool:
    """Whether this process may write the policy: then whoever takes the guard over takes the policy over as well."""
    return os.access(path, os.W_OK)


def problem(policy: SitePolicy, plan: Plan) -> Code | None:
    """Why the policy does not allow a plan; None when it does. Pure: the budget and the order of rounds are the guard's to judge."""
    data = policy.data
    layout = (data.classes, data.cells.attributes, data.spatial_shape, data.channels)
    rules: Sequence[tuple[bool, Code]] = (
        (bool(policy.apps) and plan.app_sha256 not in policy.apps, Code.APP),
        ((plan.classes, plan.attributes, plan.spatial_shape, plan.channels) != layout, Code.LAYOUT),
        (plan.net_channels not in policy.models or plan.draws > policy.largest_draws, Code.MODEL),
        (plan.learning_rate > policy.largest_learning_rate, Code.MODEL),
        (plan.low_frequencies > min(policy.largest_low_frequencies, *data.spatial_shape), Code.MODEL),
        (plan.num_phantoms > policy.largest_num_phantoms, Code.MODEL),
        (plan.noise_multiplier is not None and plan.noise_multiplier < policy.smallest_noise_multiplier, Code.NOISE),
        (plan.moments_noise_multiplier < policy.smallest_moments_noise_multiplier, Code.NOISE),
        (plan.clip_norm > policy.largest_clip_norm, Code.CLIP),
        (not policy.sampling_probability[0] <= plan.sampling_probability <= policy.sampling_probability[1], Code.SAMPLING),
        (plan.steps_per_round > policy.largest_steps_per_round or plan.rounds > policy.largest_rounds, Code.STEPS),
        (plan.rounds * plan.steps_per_round > policy.largest_steps, Code.STEPS),
    )
    return next((code for broken, code in rules if broken), None)


def is_open(policy: SitePolicy, now: datetime) -> bool:
    """Whether rounds may begin at `now`, local time."""
    return not policy.hours or any(span.holds(now) for span in policy.hours)


def data_config(policy: SitePolicy) -> Config:
    """A configuration of dpsynth that says no more than what the site's data are."""
    formats = ReleaseConfig(formats=("nifti",))  # which any number of dimensions allows
    return Config(data=policy.data, privacy=PrivacyConfig(delta=policy.delta), gate=policy.gate, release=formats)


def open_site_ledger(policy: SitePolicy, *, max_gate_attempts: int, progress: Progress) -> Ledger:
    """Read the site's data once and open their ledger with the policy's budget. Raises what `open_ledger` raises, and LedgerError when the
    guard's state knows that there was one.
    """
    if Journal(policy.state).ledger() is not None:
        raise LedgerError(f"The guard had a ledger, and there is none at {policy.ledger}. {LOST}")
    budget: dict[str, Any] = {"epsilon": policy.epsilon, "delta": policy.delta, "max_gate_attempts": max_gate_attempts}
    return open_ledger(data_config(policy), path=policy.ledger, progress=progress, **budget)


def site_ledger(policy: SitePolicy) -> Ledger:
    """The site's ledger, whose last line is noted, whoever wrote it. Raises LedgerError when it is missing, or is not the one that was seen
    before, LedgerTampered when it does not hold, ConfigError when the policy states another budget.
    """
    journal = Journal(policy.state)
    if not policy.ledger.is_file():
        step = "`dpsynth-site init POLICY` reads the data and opens it." if journal.ledger() is None else LOST
        raise LedgerError(f"There is no ledger at {policy.ledger}. {step}")
    ledger = Ledger.load(policy.ledger)
    for name, stated, booked in (("epsilon", policy.epsilon, ledger.budget_epsilon), ("delta", policy.delta, ledger.delta)):
        if stated != booked:
            raise ConfigError(f"{name}: the policy says {stated:g}, the ledger's first line {booked:g}. Correct the policy.")
    journal.note_ledger(ledger)
    return ledger


def config_of(policy: SitePolicy, plan: Plan) -> Config:
    """The configuration by which the trainer is called: data from the policy, the rest from the plan, epsilon from neither.

    What bounds the privacy loss is not read from here but from the mechanism that the ledger booked.
    """
    settings: dict[str, Any] = {"trainable": plan.trainable, "ema_decay": 0.0, "checkpoint_every": 5}
    return Config(
        method="diffusion",
        data=policy.data,
        privacy=PrivacyConfig(delta=policy.delta),
        moments=MomentsConfig(low_frequencies=plan.low_frequencies),
        pretrain=PretrainConfig(anatomies=plan.anatomies, num_phantoms=plan.num_phantoms, seed=plan.public_seed, steps=0),
        diffusion=DiffusionConfig(channels=plan.net_channels, draws=plan.draws, learning_rate=plan.learning_rate, **settings),
        gate=policy.gate,
        release=data_config(policy).release,
    )


def _with_absolute_paths(policy: SitePolicy, base: Path) -> SitePolicy:
    def absolute(path: Path) -> Path:
        return (base / path.expanduser()).resolve()

    data = policy.data if policy.data.path is None else policy.data.model_copy(update={"path": absolute(policy.data.path)})
    update: dict[str, Any] = {name: absolute(getattr(policy, name)) for name in ("ledger", "state", "socket")}
    return policy.model_copy(
        update={
            **update,
            "data": data,
            "coordinators": tuple(absolute(path) for path in policy.coordinators),
            "gate": with_absolute_encoder(policy.gate, base),
        }
    )
