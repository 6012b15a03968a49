"""The bytes on the wire. A frame is: magic, length of the header, length of the body, JSON header, safetensors body."""

from __future__ import annotations

import contextlib
import hmac
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from . import messages
from .errors import ProtocolError
from .tensors import pack

if TYPE_CHECKING:
    import torch

MAGIC = b"PDiT"
PREFIX = struct.Struct("<4sIQ")
MAX_HEADER = 1 << 20
MAX_BODY = 4 << 30
MAX_HELLO = 4096
CHUNK = 4 << 20

Parsed = TypeVar("Parsed")


class Frame(NamedTuple):
    header: bytes
    body: bytearray


class FrameSocket:
    """Frames over a connected socket. Several threads may send; one thread receives.

    `stall_timeout` is the longest silence, in seconds, inside a frame; between frames there is no limit.
    """

    def __init__(self, sock: socket.socket, *, max_body: int = MAX_BODY, stall_timeout: float = 30.0) -> None:
        self._sock = sock
        self._sock.settimeout(stall_timeout)
        self._sending = threading.Lock()
        self.max_header = MAX_HEADER
        self.max_body = max_body
        self.last_received = time.monotonic()

    def send(self, message: BaseModel, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Raises `OSError` when the other side is gone or does not read, `ProtocolError` for a frame too large."""
        header = message.model_dump_json().encode()
        body = pack(tensors or {})
        if len(header) > self.max_header or body.size > self.max_body:
            raise ProtocolError(
                f"A frame of {len(header)} + {body.size} bytes is over the limit of "
                f"{self.max_header} + {self.max_body} bytes."
            )
        with self._sending:
            for buffer in (memoryview(PREFIX.pack(MAGIC, len(header), body.size) + header), *body.buffers):
                for start in range(0, len(buffer), CHUNK):
                    self._sock.sendall(buffer[start : start + CHUNK])

    def receive(self, timeout: float | None = None) -> Frame | None:
        """The next frame; None when the other side has closed.

        Raises `TimeoutError` when no frame begins within `timeout` seconds, `ProtocolError` for a malformed one.
        """
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            raise TimeoutError(f"no frame within {timeout} s")
        prefix = self._read(PREFIX.size, may_end=True)
        if prefix is None:
            return None
        magic, header_size, body_size = PREFIX.unpack(prefix)
        if magic != MAGIC:
            raise ProtocolError("This is not a frame of the ParallelDiT protocol.")
        for name, size, limit in (("header", header_size, self.max_header), ("body", body_size, self.max_body)):
            if size > limit:
                raise ProtocolError(f"The {name} of {size} bytes is over the limit of {limit} bytes.")
        header = self._read(header_size)
        return Frame(bytes(header or b""), self._read(body_size) or bytearray())

    def _read(self, size: int, *, may_end: bool = False) -> bytearray | None:
        try:
            buffer = bytearray(size)
        except MemoryError as error:
            raise ProtocolError(f"There is no memory for a body of {size} bytes.") from error
        view, done = memoryview(buffer), 0
        while done < size:
            try:
                count = self._sock.recv_into(view[done : done + CHUNK])
            except TimeoutError as error:
                raise ProtocolError("The other side stopped in the middle of a frame.") from error
            if count == 0:
                if may_end and done == 0:
                    return None
                raise ProtocolError("The connection ended in the middle of a frame.")
            done += count
            self.last_received = time.monotonic()
        return buffer

    def hang_up(self, seconds: float = 0.5) -> None:
        """Close after the last frame has been taken: closing on unread bytes would reset the connection and lose it."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            self._sock.settimeout(seconds)
            while time.monotonic() < deadline and self._sock.recv(CHUNK):
                pass
        self.close()

    def close(self) -> None:
        """Closes the stream; threads that send or receive wake with an error."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def parse(schema: TypeAdapter[Parsed], header: bytes) -> Parsed:
    """The message of a frame's header. Raises `ProtocolError` naming the field that is wrong."""
    try:
        return schema.validate_json(header)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProtocolError(f"Malformed message: {where or 'header'}: {first['msg']}.") from error


def request_id(header: bytes) -> int:
    """The id that a malformed request seems to have, so that the reply reaches its sender; else 0."""
    found = _loose(header).get("id")
    return found if type(found) is int and found >= 0 else 0


def greet(stream: FrameSocket, token: str, timeout: float = 15.0) -> messages.Welcome:
    """The client's half of the handshake. Raises `ProtocolError` with the sidecar's reason when it is refused."""
    stream.send(messages.Hello(version=messages.PROTOCOL_VERSION, token=token))
    frame = stream.receive(timeout)
    if frame is None:
        raise ProtocolError("The sidecar closed the connection during the handshake.")
    reply = parse(messages.FROM_SIDECAR, frame.header)
    if isinstance(reply, messages.Failure):
        raise ProtocolError(reply.message)
    if not isinstance(reply, messages.Welcome):
        raise ProtocolError(f"The sidecar answered the handshake with {reply.type!r}.")
    return reply


def admit(stream: FrameSocket, token: str, welcome: messages.Welcome, timeout: float = 10.0) -> None:
    """The sidecar's half of the handshake. Raises `ProtocolError` for a refused client, after sending it the reason."""
    full_limits = stream.max_header, stream.max_body
    stream.max_header, stream.max_body = MAX_HELLO, 0
    try:
        frame = stream.receive(timeout)
        if frame is None:
            raise ProtocolError("The client closed the connection during the handshake.")
        _check_hello(frame.header, token)
    except ProtocolError as error:
        stream.max_header = MAX_HEADER
        stream.send(messages.Failure(id=0, code="protocol", message=str(error)))
        stream.hang_up()
        raise
    stream.max_header, stream.max_body = full_limits
    stream.send(welcome)


def _check_hello(header: bytes, token: str) -> None:
    """The version comes first: a Hello of another version may have another shape."""
    version = _loose(header).get("version")
    if type(version) is int and version != messages.PROTOCOL_VERSION:
        raise ProtocolError(
            f"The client speaks protocol version {version}, the sidecar version {messages.PROTOCOL_VERSION}.",
        )
    hello = parse(TypeAdapter(messages.Hello), header)
    if not hmac.compare_digest(hello.token.encode(errors="replace"), token.encode()):
        raise ProtocolError("Wrong token.")


def _loose(header: bytes) -> dict[str, Any]:
    try:
        found = json.loads(header)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
