"""Between the coordinator's process and the ServerApp that Flower runs for it: a Unix socket over which the app fetches its jobs.

The app cannot tell what it carries, and a run of it that dies costs nothing: the next one is started and carries the same frames.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BufferedRWPair
from pathlib import Path

from dpsynth.errors import DpsynthError, StorageError
from federated.messages import Code, encode_refusal
from federated.serve import LENGTH

_STARTING_SECONDS = 120.0
_GRACE_SECONDS = 60.0  # beyond a round's deadline, for Flower's own polling
_LARGEST_BLOCK_BYTES = 1 << 30
_NO_GUARD = 1003  # what the client app says when nobody listens at the guard's socket; other codes are Flower's


class CarrierLost(DpsynthError):
    """Flower did not start the app that carries messages."""


@dataclass
class Relay:
    """Carries frames by Flower. nodes: Flower's node id by site. start: starts a run of the app that will connect to `path`."""

    path: Path
    nodes: Mapping[str, int]
    start: Callable[[], None]
    _listener: socket.socket | None = None
    _connection: socket.socket | None = field(default=None)

    def __call__(self, requests: Mapping[str, bytes], *, deadline_seconds: float) -> dict[str, bytes]:
        """Replies by site, in the place of a missing one its reason where that is known; none when the carrier dies underway.

        Raises CarrierLost when it does not start.
        """
        connection = self._connected()
        connection.settimeout(deadline_seconds + _GRACE_SECONDS)
        try:
            with connection.makefile("rwb") as stream:
                return self._carried(stream, requests, deadline_seconds)
        except (OSError, ValueError, KeyError):
            self.close()
            return {}

    def _carried(self, stream: BufferedRWPair, requests: Mapping[str, bytes], seconds: float) -> dict[str, bytes]:
        sites = list(requests)
        head = {"seconds": seconds, "nodes": [str(self.nodes[site]) for site in sites]}
        for block in (json.dumps(head).encode(), *(requests[site] for site in sites)):
            stream.write(LENGTH.pack(len(block)) + block)
        stream.flush()
        answer = json.loads(_block(stream))
        names = {str(node): site for site, node in self.nodes.items()}
        replies = {names[str(node)]: _block(stream) for node in answer["nodes"]}
        for node, code in answer["failed"].items():
            replies[names[node]] = encode_refusal(Code.UNREACHABLE if code == _NO_GUARD else Code.CARRIER)
        return {site: reply for site, reply in replies.items() if site in requests}

    def _connected(self) -> socket.socket:
        if self._connection is not None:
            return self._connection
        if self._listener is None:
            self.path.unlink(missing_ok=True)
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._listener.bind(str(self.path))
            except OSError as error:
                raise StorageError(
                    f"Could not make the socket {self.path}: {error}. Its path must have fewer than 108 characters."
                ) from error
            self.path.chmod(0o600)
            self._listener.listen(1)
            self._listener.settimeout(_STARTING_SECONDS)
        self.start()
        try:
            self._connection, _ = self._listener.accept()
        except TimeoutError:
            raise CarrierLost("Flower did not start the app within two minutes. `flwr log` and the logs of `up` say why.") from None
        return self._connection

    def close(self) -> None:
        """End the app's run."""
        for item in (self._connection, self._listener):
            if item is not None:
                item.close()
        self._connection = self._listener = None
        self.path.unlink(missing_ok=True)


def _block(stream: BufferedRWPair) -> bytes:
    (length,) = LENGTH.unpack(stream.read(LENGTH.size).ljust(LENGTH.size, b"\xff"))
    block = stream.read(length) if length <= _LARGEST_BLOCK_BYTES else b""
    if len(block) != length:
        raise ConnectionError("the carrier is gone")
    return block
