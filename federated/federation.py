"""What a coordinator sets up: which sites, how many rounds, which model, and how much privacy each site is asked for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpsynth.config import Config, dump_config, parse_config, resolved, wrong_settings, yaml_mapping
from dpsynth.errors import ConfigError
from dpsynth.plan import planned_mechanisms
from dpsynth.privacy.accountant import FINE
from dpsynth.privacy.calibrate import resolve_delta
from dpsynth.privacy.mechanism import MomentRelease, PoissonDpSgd
from dpsynth.signing import load_public
from federated.messages import Digest, Name, Plan

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


STEPS_PER_ROUND = 10


class Federation(BaseModel):
    """One study. `config` is one of dpsynth: its data settings say the layout, and the declared patients of all sites together."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    study: Name = Field(description="Name of the study, new for each one.")
    sites: tuple[Name, ...] = Field(
        min_length=1,
        max_length=200,
        description="The sites that are asked; no others are. The same for the whole study: each site signs for all of them.",
    )
    quorum: Count = Field(description="Fewest usable answers with which a round counts.")
    rounds: Annotated[int, Field(ge=0)] = Field(
        description="Rounds of DP-SGD after those of the moments; by default what `config.diffusion.steps` need, 0 if nothing is trained."
    )
    steps_per_round: Count = Field(STEPS_PER_ROUND, description="DP-SGD steps at each site in each round.")
    deadline_seconds: Positive = Field(900.0, description="How long a round waits for the sites.")
    retries: Annotated[int, Field(ge=0, le=20)] = Field(2, description="How often a site that gave no answer is asked again in a round.")
    retry_pause_seconds: Annotated[float, Field(ge=0, le=86_400)] = Field(
        30.0, description="How long is waited before it is asked again: longer than a guard needs to start."
    )
    weights: Literal["uniform"] | dict[Name, Positive] = Field(
        "uniform",
        description="Weight of each site in the mean: equal, or declared public numbers for all sites; never a count of patients.",
    )
    left_out: tuple[Name, ...] = Field((), description="Sites whose answers are no longer used.")
    app_sha256: Digest | None = Field(None, description="SHA-256 of the app that carries the messages, where sites approve apps.")
    site_keys: dict[Name, Path] = Field(
        {},
        description="For the release: by site the public key (signing.pub) of its officer. Compare it with the site by telephone.",
    )
    config: Config

    @model_validator(mode="after")
    def _consistent(self) -> Federation:
        if len(set(self.sites)) != len(self.sites):
            raise ValueError("sites must not repeat")
        if unknown := sorted(set(self.left_out) - set(self.sites)):
            raise ValueError(f"left_out names {unknown[0]}, which is none of the sites: {', '.join(self.sites)}")
        if self.quorum > len(self.asked_sites):
            raise ValueError("quorum is larger than the number of sites")
        if self.weights != "uniform" and set(self.weights) != set(self.sites):
            raise ValueError("weights must be declared for all sites and no others")
        if unknown := sorted(set(self.site_keys) - set(self.sites)):
            raise ValueError(f"site_keys names {unknown[0]}, which is none of the sites: {', '.join(self.sites)}")
        if self.config.method != "diffusion" or self.config.votes.share > 0:
            raise ValueError("config.method must be diffusion, without votes")
        if "white_box" in self.config.gate.required:
            raise ValueError("config.gate.required: white_box looks at weights, which no site of a federation holds. Leave it out")
        if (self.rounds == 0) != (self.config.diffusion.trainable == "none"):
            raise ValueError("rounds must be 0 where config.diffusion.trainable is none, and only there")
        return self

    @property
    def asked_sites(self) -> tuple[str, ...]:
        """The sites without those that were left out."""
        return tuple(site for site in self.sites if site not in self.left_out)

    def weight(self, site: str) -> float:
        """Of one site in the mean."""
        return 1.0 if self.weights == "uniform" else self.weights[site]

    def public_keys(self) -> dict[str, Ed25519PublicKey]:
        """By site the key that signs its statements. Raises SignatureError."""
        return {site: load_public(path) for site, path in self.site_keys.items()}

    @property
    def delta(self) -> float:
        """Delta at which the study claims: for the declared patients of all sites together."""
        return resolve_delta(self.config.privacy.delta, self.config.data.declared_patients)


def load_federation(path: Path) -> Federation:
    """Read a federation's YAML file. Raises ConfigError with the path of every wrong key."""
    try:
        raw = yaml_mapping(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Expected a readable YAML file at {path}: {getattr(error, 'strerror', None) or error}.") from error
    config = raw.get("config")
    if not isinstance(config, dict):
        raise ConfigError("config: expected a configuration of dpsynth, as docs/config.md lists it.")
    try:
        sites, base = raw.get("sites"), path.resolve().parent
        own = resolved(Config.model_validate(config), sites=max(len(sites), 1) if isinstance(sites, list) else 1)
        raw = {"rounds": default_rounds(own, raw.get("steps_per_round")), **raw, "config": parse_config(dump_config(own), base=base)}
        federation = Federation.model_validate(raw)
        keys = {site: (base / key.expanduser()).resolve() for site, key in federation.site_keys.items()}
        return federation.model_copy(update={"site_keys": keys})
    except ValidationError as error:
        raise ConfigError(f"{path.name}: {wrong_settings(error)}. docs/coordinator.md lists every setting.") from error


def default_rounds(config: Config, steps_per_round: object) -> int:
    """As many rounds as the steps of a configuration need; none where nothing is trained."""
    steps = steps_per_round if isinstance(steps_per_round, int) and steps_per_round > 0 else STEPS_PER_ROUND
    return 0 if config.diffusion.trainable == "none" else math.ceil(config.diffusion.steps / steps)


def planned(federation: Federation) -> tuple[MomentRelease, PoissonDpSgd | None]:
    """Noise such that the moments and all rounds together cost a site `config.privacy.epsilon`. Without rounds the moments have all of it.

    Raises ConfigError.
    """
    config = federation.config
    diffusion = config.diffusion.model_copy(update={"steps": federation.rounds * federation.steps_per_round})
    settings = config.model_copy(update={"diffusion": diffusion})
    release, *rest = planned_mechanisms(settings, delta=federation.delta, interval=FINE)
    sgd = rest[0] if rest else None
    if not isinstance(release, MomentRelease) or not (sgd is None or isinstance(sgd, PoissonDpSgd)):
        raise ConfigError("config.privacy.unsafe_non_private: sites take part with privacy only. Remove it.")
    return release, sgd


def plan_of(federation: Federation) -> Plan:
    """The plan that goes to every site. Raises ConfigError."""
    config, (release, sgd) = federation.config, planned(federation)
    values: dict[str, Any] = {
        "sites": federation.sites,
        "classes": config.data.classes,
        "attributes": config.data.cells.attributes,
        "spatial_shape": config.data.spatial_shape,
        "channels": config.data.channels,
        "low_frequencies": config.moments.low_frequencies,
        "net_channels": config.diffusion.channels,
        "trainable": config.diffusion.trainable,
        "draws": config.diffusion.draws,
        "learning_rate": config.diffusion.learning_rate,
        "anatomies": config.pretrain.anatomies,
        "num_phantoms": config.pretrain.num_phantoms,
        "public_seed": config.pretrain.seed,
        "moments_noise_multiplier": release.noise_multiplier,
        "noise_multiplier": None if sgd is None else sgd.noise_multiplier,
        "clip_norm": (sgd or config.diffusion).clip_norm,
        "sampling_probability": (sgd or config.diffusion).sampling_probability,
        "steps_per_round": federation.steps_per_round,
        "rounds": federation.rounds,
        "app_sha256": federation.app_sha256,
    }
    return Plan.model_validate(values)
