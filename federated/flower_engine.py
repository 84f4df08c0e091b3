"""N sites on one machine over Flower's own simulation engine: virtual nodes in Ray's processes ask guards that answer in this one.

The frames, the guards and the coordinator are those of a real federation; nothing between them is authenticated, so it is for trying out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from federated.certs import make_ca, make_server_certificate
from federated.launch import APP, Coordination, Flower, Processes
from federated.relay import Relay
from federated.serve import Server

_OWN = APP.parent / "simulation"
_FILES = {
    **{path.name: path for path in (APP / "client_app.py", APP / "server_app.py")},
    **{path.name: path for path in (_OWN / "pyproject.toml", _OWN / "simulated_app.py")},
}
_FEDERATION = "@none/default"  # the one that Flower makes itself
_LARGEST_BYTES = 1 << 30


@contextmanager
def flower_engine(
    folder: Path, flower: Flower, handlers: Mapping[str, Callable[[bytes], bytes]], *, port: int, cores: int
) -> Iterator[Relay]:
    """The way to guards that answer in this process, `cores` of them at a time. handlers: by site, from frame to frame.

    `folder` is made, and its path must be short (Unix sockets). The first answers wait for Ray, some 15 seconds. Raises FlowerFailed.
    """
    guards, stop = folder / "guards", threading.Event()
    guards.mkdir(parents=True)
    servers = [
        Server(path=guards / f"{number}.sock", handle=handle, largest_bytes=_LARGEST_BYTES, stop=stop)
        for number, handle in enumerate(handlers.values())
    ]
    coordination, processes, relay_path = Coordination(folder, flower), Processes(folder), folder / "relay.sock"
    make_ca(folder, days=2)
    make_server_certificate(folder, hosts=["127.0.0.1"], days=2)
    threads = [threading.Thread(target=server.run, daemon=True) for server in servers]
    relay = Relay(
        path=relay_path,
        nodes={site: number for number, site in enumerate(handlers)},
        start=lambda: coordination.start_run(_FILES, relay=relay_path, guards=guards),
    )
    try:
        for thread in threads:
            thread.start()
        coordination.up(processes, host="127.0.0.1", port=port, nodes="--simulation")
        size = ("--num-supernodes", str(len(handlers)), "--init-args-num-cpus", str(cores), "--client-resources-num-cpus", "1")
        coordination.command("federation", "simulation-config", _FEDERATION, "fed", *size)
        yield relay
    finally:
        relay.close()
        processes.close()
        stop.set()
        for thread in threads:
            thread.join()
