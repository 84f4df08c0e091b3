"""At the coordinator: takes frames from the coordinator's own process over a Unix socket, sends them to nodes, and hands answers back."""

import json
import socket
import struct
import time
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()
LENGTH = struct.Struct(">Q")
POLL_SECONDS = 0.5  # Flower's own loop asks every 3 seconds


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Nodes are those that the coordinator registered."""
    carry(grid, str(context.run_config["relay"]), lambda node, frame: query(int(node), frame))


def carry(grid: Grid, relay: str, question: Callable[[str, bytes], Message]) -> None:
    """Carry jobs until the coordinator closes the connection. `question` makes the message with a frame for one of the names in a job."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as coordinator:
        coordinator.connect(relay)
        with coordinator.makefile("rwb") as stream:
            while job := read_block(stream):
                head = json.loads(job)
                answers = answered(grid, {name: question(name, read_block(stream)) for name in head["nodes"]}, float(head["seconds"]))
                found = {name: answer for name, answer in answers.items() if not answer.has_error()}
                failed = {name: answer.error.code for name, answer in answers.items() if answer.has_error()}
                write_block(stream, json.dumps({"nodes": list(found), "failed": failed}).encode())
                for answer in found.values():
                    write_block(stream, answer.content["frame"].to_numpy_ndarrays()[0].tobytes())
                stream.flush()


def answered(grid: Grid, messages: dict[str, Message], seconds: float) -> dict[str, Message]:
    """Answers by name; an error that Flower makes itself names no node, but the message that it answers."""
    names = dict(zip(grid.push_messages(list(messages.values())), messages, strict=True))
    waiting, end, found = {identifier for identifier in names if identifier}, time.monotonic() + seconds, {}
    while waiting and time.monotonic() < end:
        for answer in grid.pull_messages(waiting):
            found[names[answer.metadata.reply_to_message_id]] = answer
            waiting.discard(answer.metadata.reply_to_message_id)
        time.sleep(POLL_SECONDS if waiting else 0)
    return found


def query(node: int, frame: bytes) -> Message:
    """A frame for one node."""
    content = RecordDict({"frame": ArrayRecord({"frame": Array(np.frombuffer(frame, dtype=np.uint8))})})
    return Message(content=content, dst_node_id=node, message_type="query")


def read_block(stream: BinaryIO) -> bytes:
    """Eight bytes of length and so many bytes; nothing when the other side is gone."""
    head = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""


def write_block(stream: BinaryIO, block: bytes) -> None:
    """Eight bytes of length and the block."""
    stream.write(LENGTH.pack(len(block)) + block)
