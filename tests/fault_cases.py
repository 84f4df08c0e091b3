"""A federation of real processes, each kept running as systemd keeps it, and studies during which one of them is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from federation_cases import DATA
from safetensors.numpy import load_file

from dpsynth.artifacts import read_json, write_bytes
from dpsynth.privacy.ledger import Charge, Ledger
from dpsynth.progress import silent
from dpsynth.signing import generate_key, load_private
from federated.certs import CA_CERTIFICATE, make_ca, make_node_key, make_server_certificate
from federated.demonstration import free_port
from federated.federation import load_federation
from federated.launch import Coordination, Flower
from federated.messages import FIRST_TRAINING
from federated.policy import load_policy, open_site_ledger
from federated.simulate import InProcess, coordinator_of, run_study
from federated.site import Guard

SITES = ("north", "south")
ROUNDS, STEPS = 3, 7  # a checkpoint after step 5
POLICY = f"""\
site: NAME
data: {{{DATA}, name: NAME, declared_patients: 100, phantom: {{num_patients: 120, max_images: 2, seed: SEED}}}}
ledger: ledger.jsonl
state: state
socket: guard.sock
coordinators: [signing.pub]
epsilon: 60
delta: 1.0e-5
study_epsilon: 3
models: [[8, 8]]
studies: 60
reply_grid_seconds: 0
"""
STUDY = f"""\
study: NAME
sites: [{", ".join(SITES)}]
quorum: {len(SITES)}
rounds: {ROUNDS}
steps_per_round: {STEPS}
deadline_seconds: 25
retries: 20
retry_pause_seconds: 1
config:
  data: {{{DATA}, declared_patients: 200}}
  privacy: {{epsilon: 2, delta: 1.0e-5}}
  moments: {{low_frequencies: 4}}
  pretrain: {{num_phantoms: 60, steps: 2}}
  diffusion: {{trainable: all, channels: [8, 8], draws: 1, sampling_probability: 0.1, learning_rate: 0.001}}
"""
GUARD = Path(__file__).with_name("stopping_guard.py")
_MARK = "DPSYNTH_TEST_PARTY"


@dataclass
class Kept:
    """A program that is started again when it ends with an error: Restart=on-failure, RestartSec=pause, KillMode=control-group."""

    name: str
    command: Sequence[str]
    log: Path
    pause: float
    environment: Mapping[str, str] = field(default_factory=dict)
    starts: int = 0
    _stopping: threading.Event = field(default_factory=threading.Event)
    _process: subprocess.Popen[bytes] | None = None
    _thread: threading.Thread | None = None

    def start(self) -> Kept:
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()
        return self

    def wait(self, seconds: float) -> None:
        """Until it ends without an error."""
        assert self._thread is not None
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"{self.name} has not ended; its log: {self.log}"

    def close(self) -> None:
        self._stopping.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
        if self._thread is not None:
            self._thread.join(30)
        self._end_group()

    def processes(self) -> dict[int, str]:
        """Command line of everything that it started, and of itself, by process id: what systemd has in its control group."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and f"{_MARK}={self.log}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def kill(self, words: str = "") -> None:
        """SIGKILL to the one process whose command line has these words, or to the main one."""
        assert self._process is not None
        found = [pid for pid, line in self.processes().items() if words in line] if words else [self._process.pid]
        assert found, f"no {words} in {self.processes()}"
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    def _keep(self) -> None:
        while not self._stopping.is_set():
            self.starts += 1
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment, _MARK: str(self.log)}
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    self.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            code = self._process.wait()
            self._end_group()
            if code == 0:
                return
            self._stopping.wait(self.pause)

    def _end_group(self) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@dataclass
class Parties:
    """The coordinator's server side, and two hospitals with guard and node."""

    folder: Path
    flower: Flower
    port: int = field(default_factory=free_port)
    kept: dict[str, Kept] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.folder / "coordinator"

    @property
    def coordination(self) -> Coordination:
        return Coordination(self.home, self.flower)

    def keep(self, name: str, *command: str, pause: float, environment: Mapping[str, str] | None = None) -> Kept:
        log = self.folder / f"{name}.log"
        self.kept[name] = Kept(name, command, log, pause, environment or {}).start()
        return self.kept[name]

    def write(self, *, hosts: Sequence[str] = ("localhost", "127.0.0.1")) -> None:
        """Certificates, keys, policies and ledgers."""
        make_ca(self.home, days=2)
        make_server_certificate(self.home, hosts=list(hosts), days=2)
        _, public = generate_key(self.home / "coordinator")
        for seed, site in enumerate(SITES):
            folder = self.folder / site
            make_node_key(folder / "node")
            (folder / "signing.pub").write_bytes(public.read_bytes())
            write_bytes(folder / "policy.yaml", POLICY.replace("NAME", site).replace("SEED", str(seed)).encode())
            open_site_ledger(load_policy(folder / "policy.yaml"), max_gate_attempts=1, progress=silent)

    def start(self, *, host: str = "127.0.0.1", address: str = "127.0.0.1", prefix: Mapping[str, Sequence[str]] | None = None) -> None:
        """Everybody; returns when all nodes are connected. prefix: by site, words before its node's command; address: what nodes dial."""
        words = ("--flower", str(self.flower.programs))
        self.keep("up", *python("coordinator_cli"), "up", str(self.home), *words, "--host", host, "--port", str(self.port), pause=2)
        wait_until(lambda: "listening" in self.log("up"), 120)
        for site in SITES:
            self.coordination.approve(site, self.folder / site / "node" / "node.pub")
            self.start_guard(site)
            before = (prefix or {}).get(site, ())
            self.keep(f"node-{site}", *before, *self.node(site, address), pause=10)
        wait_until(lambda: set(self.coordination.online()) == set(SITES), 180)
        wait_until(lambda: all((self.folder / site / "guard.sock").exists() for site in SITES), 120)

    def start_guard(self, site: str) -> None:
        self.keep(f"guard-{site}", sys.executable, str(GUARD), str(self.folder / site / "policy.yaml"), pause=2)

    def node(self, site: str, address: str) -> list[str]:
        folder = self.folder / site
        where = [
            "--superlink",
            f"{address}:{self.port}",
            "--ca",
            str(self.home / CA_CERTIFICATE),
            "--key",
            str(folder / "node" / "node.key"),
        ]
        own = ["--guard", str(folder / "guard.sock"), "--home", str(folder / "flower-home"), "--port", str(free_port())]
        return [*python("coordinator_cli"), "node", *where, *own, "--flower", str(self.flower.programs)]

    def begin(self, study: str) -> Kept:
        """The coordinator's process of a new study."""
        path = self.home / f"{study}.yaml"
        path.write_text(STUDY.replace("NAME", study))
        words = ("run", str(path), "--folder", str(self.home), "--run", str(self.run(study)), "--flower", str(self.flower.programs))
        return self.keep(f"study-{study}", *python("coordinator_cli"), *words, pause=3)

    def run(self, study: str) -> Path:
        return self.folder / "runs" / study

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def stop_at(self, site: str, place: str) -> None:
        (self.folder / site / "stop").write_text(place)

    def wait_stopped(self, site: str, seconds: float = 240) -> None:
        wait_until(lambda: (self.folder / site / "stopped").exists(), seconds)

    def go_on(self, site: str) -> None:
        (self.folder / site / "stopped").unlink(missing_ok=True)

    def charges(self, site: str, study: str) -> list[Charge]:
        ledger = self.folder / site / "ledger.jsonl"
        assert Ledger.problems_of(ledger) == []
        return [charge for charge in Ledger.load(ledger).charges() if charge.run_id.startswith(f"{study}/")]

    def asked(self, study: str) -> dict[str, list[int]]:
        return dict(read_json(self.home / "studies" / study / "sites.json")["asked"])

    def simulated(self) -> Path:
        """Run folder of the same study in one process, from the sites as they are before anybody starts, with the same keys."""
        copy = self.folder / "simulated"
        for site in SITES:
            shutil.copytree(self.folder / site, copy / site)
        (copy / "study.yaml").write_text(STUDY.replace("NAME", "simulated"))
        guards = {site: Guard.open(load_policy(copy / site / "policy.yaml")).handle for site in SITES}
        private = load_private(self.home / "coordinator" / "signing.key")
        federation, folder = load_federation(copy / "study.yaml"), copy / "study"
        run_study(coordinator_of(federation, private=private, transport=InProcess(guards), folder=folder), run_path=copy / "run")
        return copy / "run"

    def close(self) -> None:
        for kept in reversed(self.kept.values()):
            kept.close()


def python(module: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"federated.{module}")


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


def simulated_weights(parties: Parties) -> dict[str, np.ndarray]:
    """Weights of the same study in one process, with the keys that the guards of these tests have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("federated.journal.fresh_key", lambda: b"k" * 32)
        return weights(parties.simulated())


def weights(run: Path) -> dict[str, np.ndarray]:
    return dict(load_file(run / "train" / "weights.safetensors"))


def require_right(parties: Parties, study: str) -> None:
    """Every round was charged once at every site, in full, and the coordinator counts the same."""
    for site in SITES:
        charges = parties.charges(site, study)
        assert [charge.run_id.split("/")[1] for charge in charges] == [str(number) for number in range(FIRST_TRAINING + ROUNDS)]
        assert all(charge.settled for charge in charges)
        assert not list((parties.folder / site / "state" / "studies" / study).rglob("key"))
    assert parties.asked(study) == {site: list(range(FIRST_TRAINING + ROUNDS)) for site in SITES}


def require_same(parties: Parties, study: str, undisturbed: dict[str, np.ndarray]) -> None:
    """Bit by bit."""
    found = weights(parties.run(study))
    assert found.keys() == undisturbed.keys()
    for name, array in undisturbed.items():
        np.testing.assert_array_equal(found[name], array)
