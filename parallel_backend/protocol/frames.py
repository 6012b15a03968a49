"""The bytes on the wire. A frame is: magic, length of the header, length of the body, JSON header, safetensors body."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from .errors import ProtocolError
from .tensors import pack

if TYPE_CHECKING:
    import torch

MAGIC = b"PDiT"
PREFIX = struct.Struct("<4sIQ")
MAX_HEADER = 1 << 20
MAX_BODY = 4 << 30
CHUNK = 4 << 20
_ZEROS = bytes(CHUNK)

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
        self._stall_timeout = stall_timeout
        self._sock.settimeout(stall_timeout)
        self._deadline: float | None = None
        self._sending = threading.Lock()
        self.max_header = MAX_HEADER
        self.max_body = max_body
        self.last_received = time.monotonic()

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """All that one thread sends and receives in here may take `seconds` together; an error ends the connection."""
        self._deadline = time.monotonic() + seconds
        yield
        self._deadline = None
        self._sock.settimeout(self._stall_timeout)

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
        if self._deadline is None and not poll.poll(None if timeout is None else timeout * 1000):
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
        """`size` bytes. The memory for them is taken as they come: who claims much has to send much."""
        buffer, done = bytearray(), 0
        while done < size:
            if done == len(buffer):
                _grow(buffer, min(size - done, CHUNK))
            with memoryview(buffer) as view:
                count = self._receive_into(view[done : done + CHUNK])
            if count == 0:
                if may_end and done == 0:
                    return None
                raise ProtocolError("The connection ended in the middle of a frame.")
            done += count
            self.last_received = time.monotonic()
        return buffer

    def _receive_into(self, view: memoryview) -> int:
        try:
            if self._deadline is not None:
                self._sock.settimeout(max(0.001, self._deadline - time.monotonic()))
            return self._sock.recv_into(view)
        except TimeoutError as error:
            reason = "The other side stopped in the middle of a frame."
            raise ProtocolError(reason if self._deadline is None else "The handshake takes too long.") from error
        finally:
            view.release()

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


def _grow(buffer: bytearray, size: int) -> None:
    try:
        buffer += _ZEROS[:size]
    except MemoryError as error:
        raise ProtocolError(f"There is no memory for more than {len(buffer)} bytes of a frame.") from error


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
    found = loose(header).get("id")
    return found if type(found) is int and 0 <= found < 1 << 63 else 0


def loose(header: bytes) -> dict[str, Any]:
    """The object of a header of unknown shape; empty when it is none."""
    try:
        found = json.loads(header)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
