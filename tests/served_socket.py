"""A live server of rank 0, without ranks."""

from __future__ import annotations

import threading
import time

import torch
from paralleldit.parallel_backend.protocol import addresses, frames, handshake, messages
from paralleldit.parallel_backend.protocol.frames import MAGIC, PREFIX, FrameSocket
from paralleldit.parallel_backend.worker.server import Server, listen

WELCOME = messages.Welcome(version=messages.PROTOCOL_VERSION, ranks=1, device="cpu", pid=1)
TOKEN = "the right one"


class Rank:
    """Serves what the server hands out: echoes at once, or holds a prompt "hold" until `release` or cancel."""

    def __init__(self, directory, address="unix", **more):
        self.path = directory / "socket"
        self.release = threading.Event()
        self.served = []
        status = lambda running: {"busy": running.request.id}  # noqa: E731
        listener = listen(address, self.path)
        self.address = address if address == "unix" else f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        usual = {"token": TOKEN, "max_body": 1 << 20, "stall_timeout": 0.3, "status": status}
        self.server = Server(listener, WELCOME, **(usual | more))
        self.server.start()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            work = self.server.next()
            self.served.append(work)
            while getattr(work.request, "prompt", "") == "hold" and not self.release.wait(0.01) and not work.cancelled:
                pass
            if work.cancelled:
                reply = messages.Failure(id=work.request.id, code="cancelled", message="Cancelled.")
                self.server.finish(work, reply)
            else:
                self.server.finish(work, messages.Result(id=work.request.id), work.tensors)

    def connect(self, greet=True):
        stream = FrameSocket(addresses.connect(self.address, self.path, timeout=5))
        if greet:
            handshake.greet(stream, TOKEN)
        return stream


def prompt(request, text="", **more):
    return messages.EncodeText(id=request, text=messages.TextRef(path="/none"), prompt=text, **more)


def receive(stream, timeout=5.0):
    frame = stream.receive(timeout)
    return frame and frames.parse(messages.FROM_SIDECAR, frame.header)


def send_raw(stream, header, body=b"", magic=MAGIC):
    stream._sock.sendall(PREFIX.pack(magic, len(header), len(body)) + header + body)


def answers(rank):
    stream = rank.connect()
    stream.send(prompt(7), {"x": torch.ones(5)})
    reply = receive(stream)
    stream.close()
    return reply == messages.Result(id=7)


def wait_for(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
