"""Small hospitals of procedural patients, their guards, and a coordinator that they approve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dpsynth.config import Config, parse_config
from dpsynth.model.moment_release import Summaries, Told, moment_queries, rows_of, told_by
from dpsynth.model.noised_sums import patient_sum
from dpsynth.progress import silent
from dpsynth.signing import generate_key, load_private
from dpsynth.train.public import public_images
from federated.coordinator import Coordinator
from federated.federation import Federation, plan_of
from federated.messages import Facts, Plan, Reply, decode_reply, decode_request, encode_reply, encode_request
from federated.policy import SitePolicy, load_policy, open_site_ledger
from federated.rounds import MOMENTS, NET, SUMS, Model, told_arrays
from federated.simulate import InProcess
from federated.site import Guard

EPSILON, DELTA = 12.0, 1e-5
DATA = "format: phantom, spatial_shape: [12, 12], classes: [normal, lesion]"
CONFIG = f"""\
data: {{{DATA}, declared_patients: 300}}
privacy: {{epsilon: 10, delta: 1.0e-5}}
moments: {{low_frequencies: 4}}
pretrain: {{num_phantoms: 60, steps: 2}}
diffusion: {{trainable: all, channels: [8, 8], draws: 1, sampling_probability: 0.1, learning_rate: 0.001}}
"""
POLICY = f"""\
site: NAME
data: {{{DATA}, name: NAME, declared_patients: 100, phantom: {{num_patients: 120, max_images: 2, seed: SEED}}}}
ledger: ledger.jsonl
state: state
socket: guard.sock
coordinators: [coordinator/signing.pub]
epsilon: {EPSILON}
delta: {DELTA}
study_epsilon: 11
models: [[8, 8]]
largest_steps_per_round: 4
largest_steps: 20
reply_grid_seconds: 0
"""


@dataclass
class Site:
    """A hospital's folder, and the guard that works in it."""

    folder: Path
    policy: SitePolicy
    guard: Guard

    def restart(self, **options: Any) -> Guard:
        self.guard = Guard.open(load_policy(self.folder / "policy.yaml"), **options)
        return self.guard

    def write_policy(self, **changes: Any) -> None:
        path = self.folder / "policy.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
        path.chmod(0o600)


@dataclass
class World:
    """Sites by name, the coordinator's key and plan, and what a round's message holds."""

    folder: Path
    sites: dict[str, Site]
    private: Ed25519PrivateKey
    federation: Federation
    plan: Plan
    model: Model
    bodies: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def request(self, kind: str = "moments", number: int = 0, **changes: Any) -> bytes:
        """A good message for site a, with changes. `plan` and `arrays` may be among them, and `private` signs."""
        arrays = changes.pop("arrays", told_body(self.model, number) if kind == "moments" else self.bodies[kind])
        private = changes.pop("private", self.private)
        fields = {"kind": kind, "study": "study", "site": "a", "message_id": f"{kind}-{number}", "round": number, "plan": self.plan}
        return encode_request({**fields, **changes}, arrays, private=private)

    def ask(self, kind: str = "moments", number: int = 0, **changes: Any) -> Reply:
        """What the guard of site a says to it."""
        return self.tell(self.request(kind, number, **changes))

    def tell(self, raw: bytes) -> Reply:
        return decode_reply(self.sites["a"].guard.handle(raw), largest_bytes=1 << 30)[0]

    def changed(self, **changes: Any) -> Plan:
        """The plan with other values."""
        return self.plan.model_copy(update=changes)


def config() -> Config:
    return parse_config(CONFIG, base=Path("/"))


def new_site(folder: Path, *, name: str, seed: int, public_key: bytes) -> Site:
    (folder / "coordinator").mkdir(parents=True)
    (folder / "coordinator" / "signing.pub").write_bytes(public_key)
    path = folder / "policy.yaml"
    path.write_text(POLICY.replace("NAME", name).replace("SEED", str(seed)))
    path.chmod(0o600)
    policy = load_policy(path)
    open_site_ledger(policy, max_gate_attempts=3, progress=silent)
    return Site(folder=folder, policy=policy, guard=Guard.open(policy))


@pytest.fixture(scope="session")
def federation() -> Federation:
    return Federation(study="study", sites=("a", "b", "c"), quorum=2, rounds=2, steps_per_round=2, deadline_seconds=5, config=config())


@pytest.fixture(scope="session")
def public(federation: Federation) -> tuple[Plan, Model]:
    return plan_of(federation), Model.of(federation.config)


@pytest.fixture
def new_world(tmp_path: Path, federation: Federation, public: tuple[Plan, Model]) -> Callable[..., World]:
    def make(*names: str) -> World:
        private_path, public_path = generate_key(tmp_path / "keys")
        key = public_path.read_bytes()
        sites = {name: new_site(tmp_path / name, name=name, seed=seed, public_key=key) for seed, name in enumerate(names)}
        plan, model = public
        world = World(tmp_path, sites, load_private(private_path), federation, plan, model)
        world.bodies = {"join": {}, "train": train_body(model)}
        return world

    return make


def told_body(model: Model, number: int) -> dict[str, np.ndarray]:
    """What the message of query `number` of the moments says, had public images been asked the ones before."""
    images, told, cells = public_summaries(model), Told(), np.arange(len(model.config.data.cells))
    patients = np.arange(len(images.labels))
    for query in moment_queries(model.reference)[:number]:
        rows = rows_of(query.name, images, told, model.reference)
        sums = patient_sum(rows.__getitem__, images.labels, patients, len(cells), query.clip_norm)
        told = told_by(query.name, sums, told, cells, model.reference, lambda _: 0.01)
    return told_arrays(told)


def public_summaries(model: Model) -> Summaries:
    """Of the public images, their labels dealt out in turn."""
    images = drawn(model.config.model_dump_json())
    return Summaries.of(images, np.arange(len(images)) % len(model.config.data.cells), model.reference)


@cache
def drawn(config_json: str) -> np.ndarray:
    return public_images(Config.model_validate_json(config_json), progress=silent)


def train_body(model: Model) -> dict[str, np.ndarray]:
    """Moments and weights from public constants, as a first round of training has them."""
    from dpsynth.train.run import standard_moments

    moments = standard_moments(model.config, model.reference).to_arrays()
    weights = {NET + name: parameter.detach().numpy() for name, parameter in model.denoiser().net.named_parameters()}
    return {**{MOMENTS + name: array for name, array in moments.items()}, **weights}


@pytest.fixture
def world(new_world: Callable[..., World]) -> World:
    """One site, a."""
    return new_world("a")


Handler = Callable[[bytes], bytes]
FACTS = Facts(unit="patient", declared_patients=100, max_images_per_patient=8, delta=1e-5, charged=(), ledger_epsilon=1.0)


class Hospital:
    """Answers without patients: sums of public images, and weights a small step away. Keeps what it was asked."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rng, self.frames = world, np.random.default_rng(seed), []

    def __call__(self, raw: bytes) -> bytes:
        self.frames.append(raw)
        signed = decode_request(raw, coordinators=(self.world.private.public_key(),), largest_bytes=len(raw))
        arrays = {}
        if signed.request.kind == "moments":
            arrays = {SUMS: self.sums(signed.request.round, signed.arrays)}
        if signed.request.kind == "train":
            arrays = {
                name: (array + 1e-4 * self.rng.normal(size=array.shape)).astype(np.float32)
                for name, array in signed.arrays.items()
                if name.startswith(NET)
            }
        return encode_reply(request_sha256=signed.digest, facts=FACTS, arrays=arrays)

    def sums(self, number: int, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The answer to query `number`."""
        model, query = self.world.model, moment_queries(self.world.model.reference)[number]
        images = public_summaries(model)
        rows = rows_of(query.name, images, model.told(arrays, query.name), model.reference)
        return patient_sum(rows.__getitem__, images.labels, np.arange(len(rows)), len(model.config.data.cells), query.clip_norm)


def study(world: World, handlers: Mapping[str, Handler], folder: Path, **changes: object) -> Coordinator:
    return Coordinator(
        federation=world.federation.model_copy(update=changes), plan=world.plan, model=world.model, private=world.private,
        transport=InProcess(handlers), folder=folder, pause=lambda _: None,
    )  # fmt: skip


def initial(world: World) -> Callable[[], dict[str, np.ndarray]]:
    return lambda: {name: array for name, array in world.bodies["train"].items() if name.startswith(NET)}


@pytest.fixture
def empty(new_world: Callable[..., World]) -> World:
    """No site at all: for coordinators with made-up ones."""
    return new_world()
