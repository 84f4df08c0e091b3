"""The relay against an app of the test's own: frames find their sites, and an app that dies is started again."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

from federated.messages import Code, decode_reply
from federated.relay import Relay
from federated.serve import LENGTH

NODES = {"a": 2**63 + 5, "b": 7}


class App:
    """What the ServerApp does, answering with the reversed frame; dies in its first job when told to."""

    def __init__(self, path: Path, *, deaths: int = 0) -> None:
        self.path, self.deaths, self.starts = path, deaths, 0
        self.failed: dict[str, int] = {}  # Flower's error code by node

    def start(self) -> None:
        self.starts += 1
        threading.Thread(target=self._run, args=(self.starts <= self.deaths,), daemon=True).start()

    def _run(self, dies: bool) -> None:
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(self.path))
            with link.makefile("rwb") as stream:
                while head := stream.read(8):
                    job = json.loads(stream.read(LENGTH.unpack(head)[0]))
                    frames = [stream.read(LENGTH.unpack(stream.read(8))[0]) for _ in job["nodes"]]
                    if dies:
                        return
                    order = [pair for pair in zip(job["nodes"], frames, strict=True) if pair[0] not in self.failed][::-1]
                    for block in (
                        json.dumps({"nodes": [node for node, _ in order], "failed": self.failed}).encode(),
                        *(frame[::-1] for _, frame in order),
                    ):
                        stream.write(LENGTH.pack(len(block)) + block)
                    stream.flush()


def test_frames_find_their_sites(tmp_path: Path) -> None:
    app = App(tmp_path / "relay.sock")
    relay = Relay(path=app.path, nodes=NODES, start=app.start)
    assert relay({"a": b"123", "b": b"xyz" * 100_000}, deadline_seconds=5) == {"a": b"321", "b": b"zyx" * 100_000}
    assert relay({"b": b"56"}, deadline_seconds=5) == {"b": b"65"}
    assert app.starts == 1
    relay.close()


def test_an_app_that_dies_gives_no_answers_and_the_next_question_starts_another(tmp_path: Path) -> None:
    app = App(tmp_path / "relay.sock", deaths=1)
    relay = Relay(path=app.path, nodes=NODES, start=app.start)
    assert relay({"a": b"123"}, deadline_seconds=5) == {}
    assert relay({"a": b"123"}, deadline_seconds=5) == {"a": b"321"}
    assert app.starts == 2
    relay.close()


def test_a_site_that_was_not_reached_is_told_apart_from_one_that_is_silent(tmp_path: Path) -> None:
    """1003 is the client app's own code, for a guard that does not listen; 5 is Flower's, for a node that is gone."""
    app = App(tmp_path / "relay.sock")
    relay = Relay(path=app.path, nodes={**NODES, "c": 9}, start=app.start)
    app.failed = {"7": 1003, "9": 5}
    replies = relay({"a": b"123", "b": b"xyz", "c": b"xyz"}, deadline_seconds=5)
    assert replies["a"] == b"321"
    assert decode_reply(replies["b"], largest_bytes=1 << 20)[0].code is Code.UNREACHABLE
    assert decode_reply(replies["c"], largest_bytes=1 << 20)[0].code is Code.CARRIER
    relay.close()
