"""The socket: lengths, stalled clients, who may ask."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dpsynth.errors import StorageError, UsageError
from federated.messages import Code, decode_reply
from federated.serve import LENGTH, Server, ask


@contextmanager
def listening(path: Path, handle: Callable[[bytes], bytes], **options: Any) -> Iterator[Server]:
    server = Server(path=path, handle=handle, largest_bytes=1000, **options)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, kwargs={"listening": ready.set})
    thread.start()
    assert ready.wait(timeout=10)  # the socket's file is there before anybody listens at it
    try:
        yield server
    finally:
        server.stop.set()
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_a_frame_comes_back_as_the_guard_answers(tmp_path: Path) -> None:
    with listening(tmp_path / "s", lambda raw: raw[::-1]):
        assert ask(tmp_path / "s", b"abc", seconds=5) == b"cba"
        assert ask(tmp_path / "s", b"", seconds=5) == b""
    assert not (tmp_path / "s").exists()


def test_only_owner_and_group_may_ask(tmp_path: Path) -> None:
    with listening(tmp_path / "s", lambda raw: raw):
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o660


def test_a_length_above_the_limit_is_refused_before_anything_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with listening(tmp_path / "s", lambda raw: pytest.fail("it was read")), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(tmp_path / "s"))
        client.sendall(LENGTH.pack(1 << 62))
        (length,) = LENGTH.unpack(client.recv(8, socket.MSG_WAITALL))
        reply, _ = decode_reply(client.recv(length, socket.MSG_WAITALL), largest_bytes=1 << 20)
        assert reply.code is Code.TOO_LARGE
        assert "too-large" in caplog.text


def test_clients_that_stall_or_leave_hold_nobody_up(tmp_path: Path) -> None:
    with listening(tmp_path / "s", lambda raw: raw):
        stalled = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for client in stalled:
            client.connect(str(tmp_path / "s"))
            client.sendall(LENGTH.pack(500) + b"half")
        with socket.socket(socket.AF_UNIX) as gone:
            gone.connect(str(tmp_path / "s"))
            gone.sendall(LENGTH.pack(3) + b"abc")
        assert ask(tmp_path / "s", b"abc", seconds=5) == b"abc"
        for client in stalled:
            client.close()


def test_a_guard_that_was_killed_leaves_a_socket_that_the_next_one_takes_and_a_living_one_keeps_it(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    with listening(tmp_path / "s", lambda raw: raw):
        while True:
            try:
                assert ask(tmp_path / "s", b"abc", seconds=5) == b"abc"
                break
            except ConnectionRefusedError:  # of the dead one's file
                time.sleep(0.01)
        with pytest.raises(UsageError, match="Another guard"):
            Server(path=tmp_path / "s", handle=lambda raw: raw, largest_bytes=10).run()


def test_a_socket_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="fewer than 108"):
        Server(path=tmp_path / ("x" * 120), handle=lambda raw: raw, largest_bytes=10).run()


class Clock(threading.Event):
    """Time that passes only where somebody works or waits."""

    now = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        time.sleep(0.02)  # for others to do what they should not do meanwhile
        self.now += timeout or 0.0
        return False

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("federated.serve.time", clock)
    return clock


@pytest.mark.parametrize(("seconds", "steps"), [(1, 1), (8, 1), (14, 2), (35, 4)])
def test_answers_leave_on_a_grid_of_times(tmp_path: Path, clock: Clock, seconds: float, steps: int) -> None:
    """Two rounds that took different times, as more or fewer patients make them, answer at the same time after their question."""

    def answer(raw: bytes) -> bytes:
        clock.now += seconds
        return raw

    with listening(tmp_path / "s", answer, grid_seconds=9, stop=clock):
        ask(tmp_path / "s", b"x", seconds=20)
    assert clock.now == 9 * steps


def test_questions_in_between_do_not_tell_when_a_round_ended(tmp_path: Path, clock: Clock) -> None:
    """None is begun at a chosen time of the grid, or at the end of another: either would tell more than a round's number of steps."""
    begins: list[float] = []
    clients = [threading.Thread(target=ask, args=(tmp_path / "s", raw), kwargs={"seconds": 20}) for raw in (b"join", b"round", b"join")]

    def answer(raw: bytes) -> bytes:
        begins.append(clock.now)
        for client in clients if len(begins) == 1 else ():
            clock.now += 2
            client.start()
            time.sleep(0.05)  # until it waits
        clock.now += 5 if raw == b"round" else 1
        return raw

    with listening(tmp_path / "s", answer, grid_seconds=9, stop=clock):
        ask(tmp_path / "s", b"round", seconds=20)
        for client in clients:
            client.join()
    assert [*begins, clock.now] == [0, 18, 27, 36, 45]
