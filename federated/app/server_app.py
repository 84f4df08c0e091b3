"""At the coordinator: takes frames from the coordinator's own process over a Unix socket, sends them to nodes, and hands answers back."""

import json
import socket
import struct
from typing import BinaryIO

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()
LENGTH = struct.Struct(">Q")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry jobs until the coordinator closes the connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as coordinator:
        coordinator.connect(str(context.run_config["relay"]))
        with coordinator.makefile("rwb") as stream:
            while job := read_block(stream):
                head = json.loads(job)
                messages = [query(int(node), read_block(stream)) for node in head["nodes"]]
                answers = list(grid.send_and_receive(messages, timeout=float(head["seconds"])))
                found = [(answer.metadata.src_node_id, answer) for answer in answers if not answer.has_error()]
                write_block(stream, json.dumps({"nodes": [str(node) for node, _ in found]}).encode())
                for _, answer in found:
                    write_block(stream, answer.content["frame"].to_numpy_ndarrays()[0].tobytes())
                stream.flush()


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
