"""At a site: hands a frame to the hospital's guard and its answer back. It can read neither, and decides nothing."""

import socket
import struct

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
LENGTH = struct.Struct(">Q")
UNREACHABLE, SECONDS, LARGEST = 1003, 7200.0, 1 << 30


@app.query()
def carry(message: Message, context: Context) -> Message:
    """The hospital itself has said where its guard is."""
    return answered_by(str(context.node_config["guard"]), message)


def answered_by(guard: str, message: Message) -> Message:
    """One frame there, one frame back."""
    frame = message.content["frame"].to_numpy_ndarrays()[0].tobytes()
    try:
        reply = ask(guard, frame)
    except (OSError, ValueError):  # no text of it: it may name a path
        return Message(Error(code=UNREACHABLE, reason="the guard of the site does not answer"), reply_to=message)
    return Message(RecordDict({"frame": ArrayRecord({"frame": Array(np.frombuffer(reply, dtype=np.uint8))})}), reply_to=message)


def ask(path: str, frame: bytes) -> bytes:
    """Eight bytes of length and a frame over the guard's Unix socket, and the same back."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as guard:
        guard.settimeout(SECONDS)
        guard.connect(path)
        guard.sendall(LENGTH.pack(len(frame)) + frame)
        with guard.makefile("rb") as stream:
            length = LENGTH.unpack(stream.read(LENGTH.size).ljust(LENGTH.size, b"\xff"))[0]
            reply = stream.read(length) if length <= LARGEST else b""
    if len(reply) != length:
        raise ConnectionError("the answer was cut off")
    return reply
