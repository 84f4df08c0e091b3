"""At the coordinator: takes frames from the coordinator's own process over a Unix socket, sends them to nodes, and hands answers back."""

import json
import socket
import struct
import time
from typing import BinaryIO

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()
LENGTH = struct.Struct(">Q")
POLL_SECONDS = 0.5  # Flower's own loop asks every 3 seconds


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry jobs until the coordinator closes the connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as coordinator:
        coordinator.connect(str(context.run_config["relay"]))
        with coordinator.makefile("rwb") as stream:
            while job := read_block(stream):
                head = json.loads(job)
                messages = [query(int(node), read_block(stream)) for node in head["nodes"]]
                answers = answered(grid, messages, float(head["seconds"]))
                found = {node: answer for node, answer in answers.items() if not answer.has_error()}
                failed = {str(node): answer.error.code for node, answer in answers.items() if answer.has_error()}
                write_block(stream, json.dumps({"nodes": [str(node) for node in found], "failed": failed}).encode())
                for answer in found.values():
                    write_block(stream, answer.content["frame"].to_numpy_ndarrays()[0].tobytes())
                stream.flush()


def answered(grid: Grid, messages: list[Message], seconds: float) -> dict[int, Message]:
    """Answers by node; an error that Flower makes itself names no node, but the message that it answers."""
    nodes = dict(zip(grid.push_messages(messages), [message.metadata.dst_node_id for message in messages], strict=True))
    waiting, end, found = {name for name in nodes if name}, time.monotonic() + seconds, {}
    while waiting and time.monotonic() < end:
        for answer in grid.pull_messages(waiting):
            found[nodes[answer.metadata.reply_to_message_id]] = answer
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
