"""Three hospitals and a coordinator on this machine, each party a process of its own, on procedural images."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dpsynth.artifacts import write_bytes
from dpsynth.checks.verdict import Outcome
from dpsynth.cli import INTERRUPTED
from dpsynth.errors import ArtifactError, DpsynthError, GateRefused
from dpsynth.generate import generate
from dpsynth.privacy.guarantee import Guarantee
from dpsynth.progress import Progress
from dpsynth.release.federated import release_federated
from dpsynth.release.verify import verify
from dpsynth.signing import generate_key, load_private
from federated.candidates import pack
from federated.certs import CA_CERTIFICATE, make_ca, make_node_key, make_server_certificate
from federated.coordinator import Event
from federated.federation import load_federation
from federated.launch import Coordination, Flower, Processes
from federated.policy import load_policy, open_site_ledger
from federated.relay import Relay
from federated.simulate import coordinator_of, run_study
from federated.site import Guard
from federated.site_approval import approve
from federated.site_checks import joined, question_of

SITES = ("north", "south", "west")
_DATA = "format: phantom, spatial_shape: [20, 20], classes: [normal, lesion], control_fraction: 0.2"
# Hospitals differ, so whether images of all of them are faithful to the patients of one is told to its officer and required of none.
# Nor is the check of groups, which cannot tell with three hundred patients in a pool.
# False alarms of three sites add up, so each site takes a third of what one alone would, and less.
_GATE = "required: [accounting, mechanism, membership, copying, content], family_error: 0.01"
POLICY = f"""\
# The rules of one hospital. Keep this file where the guard's user cannot write.
site: SITE
data: {{{_DATA}, name: phantom-SITE, declared_patients: 600, phantom: {{num_patients: 750, max_images: 2, seed: SEED}}}}
ledger: ledger.jsonl
state: state
socket: guard.sock
coordinators: [../coordinator/coordinator/signing.pub]
epsilon: 10
delta: 1.0e-5
study_epsilon: 10
models: [[32, 64]]
largest_low_frequencies: 10
reply_grid_seconds: 1
gate: {{{_GATE}}}
"""
STUDY = f"""\
study: demonstration
sites: [{", ".join(SITES)}]
quorum: 2
rounds: 3
steps_per_round: 6
deadline_seconds: 300
site_keys: {{{", ".join(f"{site}: ../{site}/keys/signing.pub" for site in SITES)}}}
config:
  method: diffusion
  data: {{{_DATA}, declared_patients: 1800}}
  privacy: {{epsilon: 9.9, delta: 1.0e-5}}
  moments: {{low_frequencies: 10}}
  pretrain: {{anatomies: [chest], num_phantoms: 600, steps: 100}}
  diffusion: {{trainable: small, draws: 1, sampling_probability: 0.05, channels: [32, 64]}}
  generate: {{count: 400}}
  gate: {{{_GATE}}}
  release: {{title: Phantom chest images of three hospitals}}
"""
CANDIDATES = "candidates.zip"
_ONLINE_SECONDS = 150.0


class Stopped(DpsynthError):
    """Ctrl-C during a demonstration, which unlike a study cannot go on."""

    exit_code = INTERRUPTED


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """Folders of all parties below one, and their processes."""

    folder: Path
    flower: Flower
    processes: Processes
    port: int

    @property
    def coordination(self) -> Coordination:
        """The coordinator's folder."""
        return Coordination(self.folder / "coordinator", self.flower)

    def write(self, *, progress: Progress) -> None:
        """Certificates, keys, policies and ledgers."""
        home = self.folder / "coordinator"
        make_ca(home, days=30)
        make_server_certificate(home, hosts=["localhost", "127.0.0.1"], days=30)
        generate_key(home / "coordinator")
        write_bytes(home / "study.yaml", STUDY.encode())
        for seed, site in enumerate(SITES):
            path = self.folder / site / "policy.yaml"
            write_bytes(path, POLICY.replace("SITE", site).replace("SEED", str(seed + 1)).encode())
            make_node_key(self.folder / site / "node")
            generate_key(self.folder / site / "keys")
            open_site_ledger(load_policy(path), max_gate_attempts=3, progress=progress)

    def start(self) -> None:
        """Flower's server side, guards and nodes; returns when all nodes are connected. Raises what they raise."""
        self.coordination.up(self.processes, host="127.0.0.1", port=self.port)
        for site in SITES:
            self.start_guard(site)
            self.coordination.approve(site, self.folder / site / "node" / "node.pub")
            self.start_node(site)
        wait_for(lambda: set(self.coordination.online()) == set(SITES), _ONLINE_SECONDS, self.processes)
        wait_for(lambda: all((self.folder / site / "guard.sock").exists() for site in SITES), _ONLINE_SECONDS, self.processes)

    def start_guard(self, site: str) -> None:
        """One hospital's guard."""
        command = [sys.executable, "-m", "federated.cli", "serve", str(self.folder / site / "policy.yaml")]
        self.processes.start(f"guard-{site}", command, {**os.environ, "OMP_NUM_THREADS": "1"})

    def start_node(self, site: str, *, key: Path | None = None, ca: Path | None = None) -> None:
        """One hospital's node of Flower."""
        home = self.folder / site / "flower-home"
        home.mkdir(parents=True, exist_ok=True)
        command = self.flower.node_command(
            superlink=f"127.0.0.1:{self.port}",
            ca=ca or self.folder / "coordinator" / CA_CERTIFICATE,
            key=key or self.folder / site / "node" / "node.key",
            guard=self.folder / site / "guard.sock",
            port=free_port(),
        )
        self.processes.start(f"node-{site}", command, self.flower.environment(home))

    def run(self, *, report: Callable[[Event], None], progress: Progress) -> Guarantee:
        """The study, to its run folder."""
        home = self.folder / "coordinator"
        federation, relay_path = load_federation(home / "study.yaml"), home / "relay.sock"
        relay = Relay(path=relay_path, nodes=self.coordination.nodes(), start=lambda: self.coordination.start_app(relay_path))
        private = load_private(home / "coordinator" / "signing.key")
        work = home / "studies" / federation.study
        coordinator = coordinator_of(federation, private=private, transport=relay, folder=work, report=report)
        try:
            return run_study(coordinator, run_path=self.folder / "run", progress=progress)
        finally:
            relay.close()

    def checked(self, *, note: Callable[[str], None], progress: Progress) -> list[Path]:
        """Each site's word on the candidates, which an officer would give after reading the report. Raises what stands in the way."""
        generate(self.folder / "run", progress=progress)
        pack(self.folder / "run", out=self.folder / CANDIDATES, private=load_private(self.folder / "coordinator/coordinator/signing.key"))
        with ThreadPoolExecutor(max_workers=2) as pool:
            for site, said in zip(SITES, pool.map(self._check, SITES), strict=True):
                note(f"at {site}:\n{said}")
        return [self._approve(site) for site in SITES]

    def _check(self, site: str) -> str:
        """What `dpsynth-site check` prints at the site. Raises GateRefused when it ends otherwise than well."""
        command = [sys.executable, "-m", "federated.cli", "check", str(self.folder / site / "policy.yaml"), str(self.folder / CANDIDATES)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise GateRefused(f"The checks at {site} ended with: {' '.join(done.stderr.split())[-300:]}")
        return done.stdout

    def _approve(self, site: str) -> Path:
        """The site's statement. Flags are accepted, since nobody looks in a demonstration; what fails is not."""
        guard, out = Guard.open(load_policy(self.folder / site / "policy.yaml")), self.folder / f"{site}.dsse.json"
        work = joined(guard, self.folder / CANDIDATES)
        flags = [verdict.check for verdict in question_of(guard, work, reviews={}).verdicts if verdict.outcome is Outcome.FLAG]
        reviews = dict.fromkeys(flags, "demonstration: procedural images, nobody looked")
        approve(guard, self.folder / CANDIDATES, key_path=self.folder / site / "keys" / "signing.key", out=out, reviews=reviews)
        return out

    def released(self, approvals: list[Path], *, progress: Progress) -> Path:
        """The released folder, verified as a recipient would. Raises GateRefused."""
        keys, study = self.folder / "coordinator" / "coordinator", self.folder / "coordinator" / "study.yaml"
        out = release_federated(
            self.folder / "run",
            out=self.folder / "release",
            key_path=keys / "signing.key",
            approvals=approvals,
            site_keys=load_federation(study).public_keys(),
            progress=progress,
        )
        if problems := verify(out, keys / "signing.pub"):
            raise GateRefused("The released folder does not verify: " + "; ".join(problems))
        return out


def demonstrate(
    folder: Path, programs: Path, *, report: Callable[[Event], None], note: Callable[[str], None], progress: Progress
) -> Guarantee:
    """All of it, from certificates to a verified release. Raises ArtifactError when the folder is in use."""
    if folder.exists() and any(folder.iterdir()):
        raise ArtifactError(f"Expected {folder} not to exist, found files in it. Name another folder, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    parties = Demonstration(folder=folder.resolve(), flower=Flower(programs), processes=Processes(folder.resolve()), port=free_port())
    try:
        parties.write(progress=progress)
        try:
            parties.start()
            guarantee = parties.run(report=report, progress=progress)
        finally:
            parties.processes.close()
        parties.released(parties.checked(note=note, progress=progress), progress=progress)
    except KeyboardInterrupt:
        raise Stopped(f"Stopped. A demonstration is not resumed: remove {folder}, or name another folder.") from None
    return guarantee


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], seconds: float, processes: Processes) -> None:
    """Wait until `condition` holds. Raises DpsynthError when it does not in time, or when a process ends."""
    end = time.monotonic() + seconds
    while not condition():
        processes.require_alive()
        if time.monotonic() > end:
            raise DpsynthError("The parties did not find each other in time. Their logs lie in the folder.")
        time.sleep(0.5)
