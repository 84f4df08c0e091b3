"""Flower's programs, started with flags under which a stranger gets nothing and nothing is fetched from the internet.

Flower lives in a Python environment of its own (its requirements exclude this project's), named by the folder of its programs. The
environment variables switch off telemetry and update checks. Every program has its own process group, ended as a whole, and on Linux
ends with the process that started it, even when that was killed: setpriv sees to it, and Flower's apps look for their own parents.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dpsynth.artifacts import read_json, write_bytes, write_json
from dpsynth.errors import ConfigError, DpsynthError, SignatureError
from federated.certs import CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY, load_certificate, node_fingerprint, require_node_key
from federated.messages import Name

APP = Path(__file__).resolve().parent / "app"
APP_FILES = ("pyproject.toml", "client_app.py", "server_app.py")
_CONNECTION = '[superlink]\ndefault = "fed"\n[superlink.fed]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{ca}"\n'
_NODES = "nodes.json"
_PROGRAMS = ("flwr", "flower-superlink", "flower-superexec", "flower-supernode")
_COMMAND_SECONDS, _HEALTH_SECONDS, _ENDING_SECONDS, _DIALLING_SECONDS = 120, 120.0, 20, 10.0


class FlowerFailed(DpsynthError):
    """One of Flower's programs failed; the message names its log."""


@dataclass(frozen=True)
class Flower:
    """The folder `bin` of the environment that Flower is installed in."""

    programs: Path

    def __post_init__(self) -> None:
        if missing := next((name for name in _PROGRAMS if not os.access(self.programs / name, os.X_OK)), ""):
            raise ConfigError(
                f"Expected Flower's programs in {self.programs}, found no {missing} to run. Make an environment for it: "
                "python3.11 -m venv flower && flower/bin/pip install 'flwr>=1.41,<1.42', and name flower/bin."
            )

    def environment(self, home: Path) -> dict[str, str]:
        """Nothing of this process's Flower settings or Python path, one home for each party, no calls home."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_") and k not in ("PYTHONPATH", "PYTHONHOME")}
        own = {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HOME": str(home),  # a service may have none, and nobody's settings are wanted
            "NO_COLOR": "1",
            "TERM": "dumb",
        }
        return {**kept, **own, "PATH": os.pathsep.join((str(self.programs), kept.get("PATH", os.defpath)))}

    def node_command(self, *, superlink: str, ca: Path, key: Path, guard: Path, port: int) -> list[str]:
        """A site's SuperNode. It listens on loopback only, for its own client app."""
        who = ["--root-certificates", str(ca), "--auth-supernode-private-key", str(key)]
        where = ["--superlink", superlink, "--host", "127.0.0.1", "--port", str(port)]
        return [str(self.programs / "flower-supernode"), *who, *where, "--node-config", f"guard={json.dumps(str(guard))}"]


def require_free(host: str, port: int) -> None:
    """Raise ConfigError when nobody can listen there: another program does, or the address is not this machine's."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"Could not listen at {host}:{port}: {reason}. Name another --host or --port, or stop who listens there."
        ) from error


def dialled(superlink: str, *, ca: Path, key: Path) -> str:
    """Why the coordinator does not answer yet, for which a node waits; empty when it does. Raises ConfigError or SignatureError for what
    no waiting mends.
    """
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):(\d{1,5})", superlink)
    if found is None or not 0 < int(found[2]) < 1 << 16:
        raise ConfigError(f"--superlink: expected HOST:PORT, as in fed.example.org:8000, found {superlink!r}.")
    load_certificate(ca, advice="Name the ca.crt that the coordinator sent.")
    require_node_key(key)
    host, context = found[1].strip("[]"), ssl.create_default_context(cafile=str(ca))
    try:
        with socket.create_connection((host, int(found[2])), timeout=_DIALLING_SECONDS) as connection:
            context.wrap_socket(connection, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        raise SignatureError(
            f"The certificate of {superlink} does not fit {ca}: {error.verify_message.rstrip('.')}. Ask the coordinator which name to "
            f"dial, and compare the CA: dpsynth-federation fingerprint {ca}"
        ) from error
    except OSError as error:
        return str(error.strerror or error)
    return ""


def _with_its_parent() -> list[str]:
    """Words before a command that is to end when this process does, however that ends."""
    program = shutil.which("setpriv")  # of util-linux
    return [] if program is None else [program, "--pdeathsig", "KILL", "--"]


@dataclass
class Processes:
    """Programs that run, each with a log of its own in `folder`."""

    folder: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start one in its own process group."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(  # noqa: S603 (no shell, own arguments)
                [*_with_its_parent(), *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def require_alive(self) -> None:
        """Raise FlowerFailed when one has ended by itself."""
        for name, process in self.running.items():
            if process.poll() is not None:
                raise FlowerFailed(f"{name} ended with code {process.returncode}. Its log: {self.folder / name}.log")

    def end(self, name: str, number: int = signal.SIGTERM) -> None:
        """End one with all that it started."""
        process = self.running.pop(name)
        for sent in (number, signal.SIGKILL):
            try:
                os.killpg(process.pid, sent)
                process.wait(_ENDING_SECONDS)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def close(self) -> None:
        """End all, the last one first."""
        for name in reversed(list(self.running)):
            self.end(name)


@dataclass(frozen=True, kw_only=True)
class Approved:
    """A site's node as the SuperLink knows it. key: its fingerprint. replaced: that of the key that the site had before, or empty."""

    node: int
    key: str
    replaced: str


@dataclass(frozen=True)
class Coordination:
    """The coordinator's folder: certificates, Flower's state, which node belongs to which site."""

    folder: Path
    flower: Flower

    @property
    def _home(self) -> Path:
        return self.folder / "home"

    def up(
        self, processes: Processes, *, host: str, port: int, nodes: str = "--enable-supernode-auth", stop: threading.Event | None = None
    ) -> None:
        """Start SuperLink and SuperExec and wait until they answer, or until `stop`. `nodes`: the flag that says which nodes there are:
        registered ones (or, on one machine, those of the simulation). Raises FlowerFailed.
        """
        stop = stop or threading.Event()
        secret = self.folder / "superexec.secret"
        if not secret.is_file():
            write_bytes(secret, secrets.token_hex(32).encode(), private=True)
        for home in (self._home, self.folder / "home-superlink", self.folder / "home-superexec"):
            home.mkdir(parents=True, exist_ok=True)
        connection = _CONNECTION.format(port=port, ca=(self.folder / CA_CERTIFICATE).resolve())
        write_bytes(self._home / "config.toml", connection.encode())
        tls = ["--ssl-ca-certfile", str(self.folder / CA_CERTIFICATE), "--ssl-certfile", str(self.folder / SERVER_CERTIFICATE)]
        tls += ["--ssl-keyfile", str(self.folder / SERVER_KEY), nodes]
        listen = ["--host", host, "--port", str(port), "--database", str(self.folder / "state.db")]
        # Without process isolation and a secret, a stranger with the public CA is handed the ServerApp's task.
        safe = ["--disable-runtime-dependency-installation", "--isolation", "process", "--superexec-auth-secret-file", str(secret)]
        link = [str(self.flower.programs / "flower-superlink"), *tls, *listen, *safe]
        processes.start("superlink", link, self.flower.environment(self.folder / "home-superlink"))
        self._wait_health(processes, port, stop)
        if stop.is_set():
            return
        execute = [str(self.flower.programs / "flower-superexec"), "--root-certificates", str(self.folder / CA_CERTIFICATE)]
        execute += ["--runtime-api-address", f"127.0.0.1:{port}", "--superexec-auth-secret-file", str(secret)]
        environment = {**self.flower.environment(self.folder / "home-superexec"), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
        processes.start("superexec", execute, environment)

    def _wait_health(self, processes: Processes, port: int, stop: threading.Event) -> None:
        context, end = ssl.create_default_context(cafile=str(self.folder / CA_CERTIFICATE)), time.monotonic() + _HEALTH_SECONDS
        while time.monotonic() < end and not stop.wait(0.2):
            processes.require_alive()
            try:
                with urllib.request.urlopen(f"https://127.0.0.1:{port}/health", context=context, timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                continue
        if not stop.is_set():
            raise FlowerFailed(f"The SuperLink does not answer. Its log: {self.folder / 'superlink.log'}")

    def command(self, *words: str) -> Any:
        """What a `flwr` command answers in JSON. Raises FlowerFailed."""
        absent = FlowerFailed(f"No SuperLink answers. Run: dpsynth-federation up {self.folder}")
        if not (self._home / "config.toml").is_file():
            raise absent
        done = subprocess.run(  # noqa: S603 (no shell, own arguments)
            [str(self.flower.programs / "flwr"), *words, "--format", "json"],
            env=self.flower.environment(self._home),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            answer = None
        if done.returncode or not isinstance(answer, dict) or not answer.get("success", True):
            said = str(answer.get("error-message", "")) if isinstance(answer, dict) else done.stderr or done.stdout
            if "Connection to the SuperLink is unavailable" in said:
                raise absent
            said = said.rpartition("SuperLink: fed")[2].partition("\n")[2] or said  # before it stands whom it asked
            raise FlowerFailed(f"`flwr {' '.join(words[:2])}` failed: {said.strip() or f'code {done.returncode}'}")
        return answer

    def approve(self, site: str, public_key: Path, *, instead_of: str | None = None) -> Approved:
        """Register a site's node; nothing changes when it is registered. Nodes that are not registered are turned away, and from now on the
        one of a key that the site had before. instead_of: the site that was given this key by mistake; the SuperLink takes no key twice,
        so both exchange what they have. Raises ConfigError, SignatureError, FlowerFailed.
        """
        try:
            TypeAdapter(Name).validate_python(site)
        except ValidationError as error:
            raise ConfigError(f"SITE: expected a name of a-z, 0-9 and -, as in the site's policy, found {site!r}.") from error
        key, approved = node_fingerprint(public_key), self._approved()
        other = next((name for name, known in approved.items() if known["key"] == key and name != site), None)
        if instead_of is not None and other != instead_of:
            raise ConfigError(f"--instead-of: {instead_of} does not have this key. Compare: {key}")
        if other is not None and instead_of is None:
            raise ConfigError(
                f"This key is that of {other}, and every site needs one of its own. Ask {site} for its node.pub, or say --instead-of "
                f"{other} if that was a mistake."
            )
        before, listed = approved.get(site), {int(node["node-id"]) for node in self._listed()}
        if other is not None:
            own = approved.pop(other)
            if own["node"] not in listed:
                raise FlowerFailed(f"The SuperLink lets this key in no more. Ask {site} for a new one (dpsynth-federation node-key).")
            write_json(self.folder / _NODES, {**approved, site: own, **({} if before is None else {other: before})})
            return Approved(node=own["node"], key=key, replaced="")
        if before is not None and before["node"] in listed:
            if before["key"] == key:
                return Approved(node=before["node"], key=key, replaced="")
            self.command("supernode", "unregister", str(before["node"]), "fed")
        node = self._registered(site, public_key)
        write_json(self.folder / _NODES, {**approved, site: {"node": node, "key": key}})
        return Approved(node=node, key=key, replaced="" if before is None or before["key"] == key else before["key"])

    def _registered(self, site: str, public_key: Path) -> int:
        try:
            return int(self.command("supernode", "register", str(public_key.resolve()), "fed")["node-id"])
        except FlowerFailed as error:
            if "already in use" not in str(error):
                raise
            raise FlowerFailed(
                f"The SuperLink knows this key, and {self.folder / _NODES} names no site for it: it was replaced, or that file was. Ask "
                f"{site} for a new key (dpsynth-federation node-key)."
            ) from error

    def nodes(self) -> dict[str, int]:
        """Flower's node id of each approved site."""
        return {site: int(known["node"]) for site, known in self._approved().items()}

    def _approved(self) -> dict[str, dict[str, Any]]:
        path = self.folder / _NODES
        return dict(read_json(path)) if path.is_file() else {}

    def _listed(self) -> list[dict[str, Any]]:
        return list(self.command("supernode", "list", "fed")["nodes"])

    def online(self) -> list[str]:
        """Approved sites whose node is connected."""
        connected = {int(node["node-id"]) for node in self._listed() if node["status"] == "online"}
        return [site for site, node in self.nodes().items() if node in connected]

    def start_app(self, relay: Path) -> None:
        """Start a run of the app; it will connect to `relay`. What travels is exactly `APP_FILES`, whatever else lies in the folder."""
        self.start_run({name: APP / name for name in APP_FILES}, relay=relay)

    def start_run(self, files: Mapping[str, Path], **settings: Path) -> None:
        """Start a run of an app of these files, with these settings."""
        with tempfile.TemporaryDirectory(
            prefix="app-", dir=self.folder
        ) as copy:  # one of its own, since studies may begin at the same time
            for name, source in files.items():
                write_bytes(Path(copy) / name, source.read_bytes())
            self.command("run", copy, "fed", "-c", " ".join(f"{name}={json.dumps(str(value))}" for name, value in settings.items()))
