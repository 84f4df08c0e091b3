"""The guard behind a Unix socket: 8 bytes of length (big-endian), a frame; the same back. One connection, one question, one answer.

A length above the policy's limit is refused before anything is read. Connections wait for each other, since the guard answers one question
at a time; each has a time limit for sending, so that a client that stalls holds nobody up for long.

With a grid each question has a whole number of its steps for itself: the next is begun only when the answer to the last one leaves. So
what others ask meanwhile, or a moment chosen for asking, tells no more of how long a round took than its own number of steps.
"""

from __future__ import annotations

import logging
import math
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dpsynth.errors import StorageError, UsageError
from federated.messages import Code, Refused, encode_refusal

_LOG = logging.getLogger("dpsynth.site")
LENGTH = struct.Struct(">Q")
_SENDING_SECONDS = 60.0
_LARGEST_NUMBER_OF_CONNECTIONS = 8


@dataclass(kw_only=True)
class Server:
    """Listens at `path` and answers with `handle`. `grid_seconds`: answers leave at multiples of this time after `handle` was called."""

    path: Path
    handle: Callable[[bytes], bytes]
    largest_bytes: int
    grid_seconds: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)
    _turn: threading.Lock = field(default_factory=threading.Lock, init=False)

    def run(self, *, listening: Callable[[], None] = lambda: None) -> None:
        """Answer until `stop` is set; call `listening` once the socket is there. Raises UsageError when another guard listens at it."""
        listener = self._listener()
        listening()
        places = threading.BoundedSemaphore(_LARGEST_NUMBER_OF_CONNECTIONS)
        try:
            while not self.stop.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                if places.acquire(blocking=False):
                    threading.Thread(target=self._answer, args=(connection, places), daemon=True).start()
                else:
                    connection.close()  # the client sees no answer and asks again
        finally:
            listener.close()
            self.path.unlink(missing_ok=True)

    def _listener(self) -> socket.socket:
        if self.path.is_socket():
            if _answers(self.path):
                raise UsageError("Another guard listens at this socket. Stop it first, or name another socket in the policy.")
            self.path.unlink()  # of a guard that was killed
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self.path))
            self.path.chmod(stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IWGRP)  # who may ask is in the socket's group
        except OSError as error:
            listener.close()
            raise StorageError(
                f"Could not make the socket {self.path.name}: {error.strerror or error}. Its folder must exist and the whole path "
                "have fewer than 108 characters."
            ) from error
        listener.listen(_LARGEST_NUMBER_OF_CONNECTIONS)
        listener.settimeout(0.2)
        return listener

    def _answer(self, connection: socket.socket, places: threading.BoundedSemaphore) -> None:
        try:
            with connection:
                connection.settimeout(_SENDING_SECONDS)
                reply = self._reply(self._question(connection))
                connection.settimeout(_SENDING_SECONDS)
                connection.sendall(LENGTH.pack(len(reply)) + reply)
        except OSError:
            pass  # whoever asked is gone; the answer is kept and asking again gives it
        finally:
            places.release()

    def _question(self, connection: socket.socket) -> bytes | None:
        """The frame that was sent; None for one that is too long."""
        (length,) = LENGTH.unpack(received(connection, LENGTH.size))
        return received(connection, length) if length <= self.largest_bytes else None

    def _reply(self, question: bytes | None) -> bytes:
        with self._turn:
            begun = time.monotonic()
            if question is None:
                _LOG.warning("refused: %s", Refused(Code.TOO_LARGE))
            reply = encode_refusal(Code.TOO_LARGE) if question is None else self.handle(question)
            if self.grid_seconds:
                passed = time.monotonic() - begun
                self.stop.wait(math.ceil(passed / self.grid_seconds) * self.grid_seconds - passed)
        return reply


def ask(path: Path, frame: bytes, *, seconds: float) -> bytes:
    """What the guard at `path` answers. Raises OSError when it does not within `seconds`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        connection.connect(str(path))
        connection.sendall(LENGTH.pack(len(frame)) + frame)
        (length,) = LENGTH.unpack(received(connection, LENGTH.size))
        return received(connection, length)


def received(connection: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes; memory grows with what really comes. Raises ConnectionError when the other side ends before."""
    parts, missing = [], count
    while missing:
        part = connection.recv(min(missing, 1 << 20))
        if not part:
            raise ConnectionError("the connection ended early")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
