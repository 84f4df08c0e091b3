"""What does a federated round cost in time and bytes beside the same local training, and do 50 sites fit into one process?

    python experiments/009-federation-cost/cost.py deployed --flower flower/bin [--patients 3000] [--rounds 5]
    python experiments/009-federation-cost/cost.py many [--sites 50]                     # guards and coordinator in one process
    python experiments/009-federation-cost/cost.py many --engine --flower flower/bin     # the same over Flower's simulation engine
    python experiments/009-federation-cost/cost.py table                 # of results.json

deployed: one hospital with guard and node, and the coordinator, as processes on this machine over Flower with TLS on loopback. Before each
round the same steps are trained here, on the same patients with the same mechanism, so the two take turns; a ratio is the round's wall time
(asking, carrying, training, answering, combining, checkpoint) over that of the training alone.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dpsynth.data.split import split_patients
from dpsynth.privacy.mechanism import PoissonDpSgd
from dpsynth.privacy.noise import NoiseStream, fresh_key
from dpsynth.progress import silent
from dpsynth.signing import load_private
from dpsynth.train.loop import fit
from dpsynth.train.run import standard_moments
from federated.certs import CA_CERTIFICATE, make_ca, make_node_key, make_server_certificate
from federated.coordinator import Coordinator, Transport
from federated.demonstration import free_port, wait_for
from federated.flower_engine import flower_engine
from federated.launch import Coordination, Flower, Processes
from federated.messages import FIRST_TRAINING
from federated.policy import config_of
from federated.public_stage import public_weights
from federated.relay import Relay
from federated.rounds import sgd_of
from federated.simulate import InProcess, coordinator_of, run_study

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from federations import DELTA, Study  # noqa: E402 (an experiment is a script; what several share lies one folder up)
from results import known, once  # noqa: E402

SITE = "north"
STEPS = 20


def study_of(folder: Path, *, sites: int, patients: int, side: int, channels: tuple[int, ...], rounds: int, steps: int) -> Study:
    """Procedural hospitals of `patients` each."""
    layout = {"format": "phantom", "spatial_shape": [side] * 2, "classes": ["normal", "lesion"]}
    names = [SITE] if sites == 1 else [f"site{index}" for index in range(sites)]
    own = {
        name: {**layout, "declared_patients": patients, "phantom": {"num_patients": patients, "max_images": 1, "seed": index}}
        for index, name in enumerate(names)
    }
    config = {
        "data": {**layout, "declared_patients": patients * sites},
        "privacy": {"epsilon": 8, "delta": DELTA},
        "moments": {"low_frequencies": min(12, side // 3)},
        "pretrain": {"anatomies": ["chest"], "num_phantoms": 300, "steps": 2},
        "diffusion": {"trainable": "all", "channels": list(channels), "learning_rate": 6e-4},
    }
    settings = {"rounds": rounds, "steps_per_round": steps, "deadline_seconds": 3000, "config": config}
    return Study(folder=folder, sites=own, settings=settings, channels=channels, epsilon=9)


def machine() -> dict[str, Any]:
    """In which setting a figure was measured."""
    load = os.getloadavg()[0]
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__, "load": round(load, 2)}


@dataclass
class TakingTurns:
    """A transport that trains the same steps here before it asks for a round. Seconds by round."""

    relay: Relay
    local: Any
    rounds: list[float] = field(default_factory=list)
    trained: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    _asked: float = 0.0  # when the present round's question was ready; from here to the next one's, less the training here
    _calls: int = 0

    def __call__(self, requests: Mapping[str, bytes], *, deadline_seconds: float) -> Mapping[str, bytes]:
        """Replies of the real federation."""
        self.finished()
        self._calls += 1
        training = self._calls > 1 + FIRST_TRAINING  # join and the queries of the moments come first
        if training:
            begun = time.monotonic()
            self.local()
            self.trained.append(time.monotonic() - begun)
        self._asked = time.monotonic() if training else 0.0
        replies = self.relay(requests, deadline_seconds=deadline_seconds)
        if training:
            self.sent.append(sum(map(len, requests.values())))
            self.received.append(sum(map(len, replies.values())))
        return replies

    def finished(self) -> None:
        """The coordinator has combined and kept the round before."""
        if self._asked:
            self.rounds.append(time.monotonic() - self._asked)
            self._asked = 0.0


def local_training(study: Study, coordinator: Coordinator, work: Path) -> Any:
    """A function that trains one round's steps as the guard does, on the same patients."""
    guard = study.guard(SITE)
    config = config_of(guard.policy, coordinator.plan)
    split = split_patients(guard.images, control_fraction=guard.policy.data.control_fraction, key=fresh_key())
    mechanism: PoissonDpSgd = sgd_of(coordinator.plan, steps=STEPS, declared_patients=guard.policy.data.declared_patients)

    def train() -> None:
        denoiser, path = coordinator.model.denoiser(), work / "checkpoint.safetensors"
        denoiser.transplant(standard_moments(config, coordinator.model.reference))
        path.unlink(missing_ok=True)
        fit(
            denoiser, split.training, mechanism, config.diffusion, stream=NoiseStream(key=fresh_key()),
            checkpoint=path, binding="local", callback=lambda _: None,
        )  # fmt: skip

    return train


@contextmanager
def running(study: Study, programs: Path) -> Iterator[Relay]:
    """All parties, and the way to the site."""
    folder, flower, port = study.folder, Flower(programs), free_port()
    coordination, processes = Coordination(folder / "coordinator", flower), Processes(folder)
    make_ca(coordination.folder, days=2)
    make_server_certificate(coordination.folder, hosts=["127.0.0.1"], days=2)
    key, public = make_node_key(folder / "node")
    try:
        coordination.up(processes, host="127.0.0.1", port=port)
        guard = [sys.executable, "-m", "federated.cli", "serve", str(study.policy(SITE))]
        processes.start("guard", guard, {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
        coordination.approve(SITE, public)
        socket = study.policy(SITE).parent / "guard.sock"
        (folder / "home").mkdir()
        ca, address = coordination.folder / CA_CERTIFICATE, f"127.0.0.1:{port}"
        node = flower.node_command(superlink=address, ca=ca, key=key, guard=socket, port=free_port())
        processes.start("node", node, flower.environment(folder / "home"))
        wait_for(lambda: coordination.online() == [SITE] and socket.exists(), 300, processes)
        relay_path = coordination.folder / "relay.sock"
        relay = Relay(path=relay_path, nodes=coordination.nodes(), start=lambda: coordination.start_app(relay_path))
        yield relay
        relay.close()
    finally:
        processes.close()


def deployed(programs: Path, patients: int, side: int, rounds: int) -> dict[str, Any]:
    """Ratios and bytes of `rounds` rounds."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        study = study_of(Path(name), sites=1, patients=patients, side=side, channels=(32, 64), rounds=rounds, steps=STEPS)
        federation, before = study.write(), machine()
        with running(study, programs) as relay:
            private = load_private(study.folder / "coordinator" / "signing.key")
            turns = TakingTurns(relay=relay, local=None)
            coordinator = coordinator_of(federation, private=private, transport=turns, folder=study.folder / "work")
            turns.local = local_training(study, coordinator, study.folder)
            coordinator.run(lambda: public_weights(federation.config))
            turns.finished()
    ratios = [own / local for own, local in zip(turns.rounds, turns.trained, strict=True)]
    return {
        "ratio": statistics.median(ratios), "ratios": ratios, "round_seconds": turns.rounds, "training_seconds": turns.trained,
        "bytes_to_site": statistics.median(turns.sent), "bytes_from_site": statistics.median(turns.received),
        "machine": before, "load_after": round(os.getloadavg()[0], 2),
    }  # fmt: skip


@contextmanager
def between(coordinator: Coordinator, study: Study, programs: Path | None) -> Iterator[Transport]:
    """What carries the frames of `many`."""
    if programs is None:
        yield coordinator.transport
        return
    assert isinstance(coordinator.transport, InProcess)
    guards = coordinator.transport.handlers
    with flower_engine(study.folder / "engine", Flower(programs), guards, port=free_port(), cores=os.cpu_count() or 1) as relay:
        yield relay


def many(sites: int, rounds: int, programs: Path | None) -> dict[str, Any]:
    """Wall and CPU seconds and peak memory of a study of so many small sites in this process, over Flower's engine when it is named."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        study = study_of(Path(name), sites=sites, patients=120, side=12, channels=(8, 8), rounds=rounds, steps=2)
        before, begun = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        coordinator = study.simulated()
        made = time.monotonic()
        with between(coordinator, study, programs) as transport:
            coordinator.transport = transport
            guarantee = run_study(coordinator, run_path=study.folder / "run", progress=silent)
        after, ended = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    return {
        "epsilon": guarantee.epsilon, "rounds": rounds, "sites": sites, "setup_seconds": made - begun, "study_seconds": ended - made,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_mb": after.ru_maxrss / 1024, "mb_before": before.ru_maxrss / 1024, "machine": machine(),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """In Markdown."""
    lines = ["| deployed | load | training, s | round, s | ratio (all rounds) | bytes to the site, back |", "|" + "---|" * 6]
    for name, found in results.items():
        if name.startswith("deployed"):
            ratios = ", ".join(f"{ratio:.2f}" for ratio in found["ratios"])
            seconds = [f"{statistics.median(found[key]):.1f}" for key in ("training_seconds", "round_seconds")]
            cells = [name, f"{found['machine']['load']} to {found['load_after']}", *seconds, f"{found['ratio']:.2f} ({ratios})"]
            lines.append(f"| {' | '.join(cells)} | {found['bytes_to_site']:,.0f}, {found['bytes_from_site']:,.0f} |")
    lines += ["", "| in one process | setup, s | rounds, s | CPU, s | peak MB (before) | load |", "|" + "---|" * 6]
    for name, found in results.items():
        if name.startswith("many"):
            cells = [f"{found[key]:.0f}" for key in ("setup_seconds", "study_seconds", "cpu_seconds")]
            memory = f"{found['peak_mb']:.0f} ({found['mb_before']:.0f})"
            lines.append(f"| {name} | {' | '.join(cells)} | {memory} | {found['machine']['load']} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what results.json lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("deployed", "many", "table"))
    parser.add_argument("--flower", type=Path, default=Path(os.environ.get("DPSYNTH_FLOWER", "flower/bin")))
    parser.add_argument("--patients", type=int, default=3000)
    parser.add_argument("--side", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sites", type=int, default=50)
    parser.add_argument("--engine", action="store_true", help="many: over Flower's simulation engine.")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = HERE / "results.json"
    if arguments.what == "deployed":
        name = f"deployed, {arguments.patients} patients, {arguments.side} px, {STEPS} steps"
        once(path, name, partial(deployed, arguments.flower.resolve(), arguments.patients, arguments.side, arguments.rounds))
    if arguments.what == "many":
        programs, name = (arguments.flower.resolve(), ", Flower's engine") if arguments.engine else (None, "")
        once(path, f"many, {arguments.sites} sites{name}", partial(many, arguments.sites, arguments.rounds, programs))
    print(table(known(path)))


if __name__ == "__main__":
    main()
