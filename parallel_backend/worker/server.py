"""Rank 0's socket: admits clients, queues their requests, sends events and replies. Knows nothing of ranks."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..protocol import addresses, frames, handshake, messages
from ..protocol.errors import ProtocolError
from ..protocol.tensors import unpack
from .pending import PendingConnections

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
MAX_QUEUED = 64
MAX_OUTGOING = 256
"""Frames that may wait for a client that reads slowly; events beyond are dropped, replies never."""
ACCEPT_AGAIN_S = 0.1
"""After a connection that could not be taken, as for want of file descriptors."""

Outgoing = tuple[messages.Message, Mapping[str, torch.Tensor]]


@dataclass(eq=False)
class Job:
    """One request on its way through the ranks."""

    request: messages.AnyRequest
    body: bytearray = field(default_factory=bytearray)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    connection: Connection | None = None
    cancelled: bool = False
    stopped_by: str = ""
    """Who had it cancelled by ending the sidecar, where it was not its own client."""
    progress: messages.Progress | None = None

    def send(self, message: messages.Message, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        if isinstance(message, messages.Progress):
            self.progress = message
        if self.connection is not None:
            self.connection.send(message, tensors)

    def cancel(self, stopped_by: str = "") -> None:
        self.cancelled, self.stopped_by = True, stopped_by

    def why_cancelled(self, words: str) -> messages.Failure:
        """The reply to a request that was cancelled: in these words if its own client did it."""
        if self.stopped_by:
            return messages.Failure(
                id=self.request.id,
                code="crash",
                message=f"The sidecar was stopped by {self.stopped_by}.",
                hint="The next request starts it again.",
            )
        return messages.Failure(id=self.request.id, code="cancelled", message=words)

    @property
    def doing(self) -> str:
        kind = self.request.type.replace("_", " ")
        return f"{kind}, step {self.progress.step} of {self.progress.total}" if self.progress else kind


class Connection:
    """A client. Its own thread writes, so that a client that does not read never holds up the ranks."""

    def __init__(self, stream: frames.FrameSocket) -> None:
        self.stream = stream
        self._outgoing: queue.Queue[Outgoing | None] = queue.Queue()
        self._writer = threading.Thread(target=self._write, name="client writer", daemon=True)
        self._writer.start()

    def send(self, message: messages.Message, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        is_reply = isinstance(message, messages.Result | messages.Failure)
        if is_reply or self._outgoing.qsize() < MAX_OUTGOING:
            self._outgoing.put((message, tensors or {}))

    def close(self, timeout: float = 1.0) -> None:
        """Send what is waiting, then close."""
        self._outgoing.put(None)
        self._writer.join(timeout)
        self.stream.hang_up()

    def _write(self) -> None:
        try:
            while (item := self._outgoing.get()) is not None:
                self._send(*item)
        except OSError as error:
            log.info("client does not read: %s", error)
            self.stream.close()

    def _send(self, message: messages.Message, tensors: Mapping[str, torch.Tensor]) -> None:
        try:
            self.stream.send(message, tensors)
        except ProtocolError as error:
            refusal = messages.Failure(id=getattr(message, "id", 0), code="protocol", message=str(error))
            self.stream.send(refusal)


class Server:
    """`next` gives the main thread one request after the other; everything else happens in the server's threads.

    `status` serves a status request while another request is under way. `patience`: seconds for a handshake.
    """

    def __init__(
        self,
        listener: socket.socket,
        welcome: messages.Welcome,
        *,
        token: str = "",
        max_body: int = frames.MAX_BODY,
        stall_timeout: float = 30.0,
        patience: float = handshake.PATIENCE_S,
        status: Callable[[Job], dict[str, object]] = lambda running: {},
    ) -> None:
        self._listener = listener
        self._welcome = welcome
        self._token = token
        self._max_body = max_body
        self._stall_timeout = stall_timeout
        self._patience = patience
        self._status = status
        self._state = threading.Condition()
        self._queue: deque[Job] = deque()
        self._connections: set[Connection] = set()
        self._pending = PendingConnections()
        self._is_closed = False
        self.running: Job | None = None
        self.last_work = time.monotonic()

    @property
    def clients(self) -> int:
        return len(self._connections)

    @property
    def is_idle(self) -> bool:
        with self._state:
            return self.running is None and not self._queue

    def start(self) -> None:
        threading.Thread(target=self._accept, name="server", daemon=True).start()

    def close(self) -> None:
        """Stop listening; send what is waiting to every client, then hang up."""
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._connections):
            connection.close()

    def next(self) -> Job:
        """Block until there is a request; it counts as running until `finish`."""
        with self._state:
            while not self._queue:
                self._state.wait()
            self.running = self._queue.popleft()
            return self.running

    def finish(self, work: Job, reply: messages.Message, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        with self._state:
            self.running = None
            self.last_work = time.monotonic()
        if isinstance(reply, messages.Failure) and reply.code == "cancelled":
            reply = work.why_cancelled(reply.message)
        work.send(reply, tensors)

    def submit(self, work: Job) -> None:
        with self._state:
            self._queue.append(work)
            self._state.notify()

    def broadcast(self, message: messages.Message) -> None:
        for connection in list(self._connections):
            connection.send(message)

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                sock, address = self._listener.accept()
            except OSError as error:
                if not self._is_closed:
                    log.warning("a client could not connect: %s", error)
                    time.sleep(ACCEPT_AGAIN_S)
                continue
            self._pending.enter(sock, address[0] if address else "")
            threading.Thread(target=self._serve, args=(sock,), name="client reader", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            self._keep_alive(sock)
            stream = frames.FrameSocket(sock, max_body=self._max_body, stall_timeout=self._stall_timeout)
            full = lambda: self.clients >= MAX_CONNECTIONS  # noqa: E731
            handshake.admit(stream, self._token, self._welcome, self._patience, full)
            self._pending.leave(sock)
            self._read(Connection(stream))
        except (ProtocolError, OSError) as error:
            log.info("client refused: %s", error)
        finally:
            self._pending.leave(sock)
            sock.close()

    def _read(self, connection: Connection) -> None:
        with self._state:
            self._connections.add(connection)
        try:
            while (frame := connection.stream.receive()) is not None:
                self._take(connection, frame)
        except ProtocolError as error:
            connection.send(messages.Failure(id=0, code="protocol", message=str(error)))
        except OSError as error:
            log.info("client lost: %s", error)
        finally:
            self._forget(connection)

    def _take(self, connection: Connection, frame: frames.Frame) -> None:
        try:
            message = frames.parse(messages.FROM_CLIENT, frame.header)
            if isinstance(message, messages.Cancel):
                self._cancel(connection, message.id)
            else:
                self._enqueue(Job(message, frame.body, unpack(frame.body), connection))
        except ProtocolError as error:
            failure = messages.Failure(id=frames.request_id(frame.header), code="protocol", message=str(error))
            connection.send(failure)

    def _enqueue(self, work: Job) -> None:
        with self._state:
            known = [*self._queue, *([self.running] if self.running else [])]
            if any(w.connection is work.connection and w.request.id == work.request.id for w in known):
                raise ProtocolError(f"Request {work.request.id} is already under way on this connection.")
            if len(self._queue) >= MAX_QUEUED:
                raise ProtocolError(f"{MAX_QUEUED} requests are waiting already.")
            self.last_work = time.monotonic()
            running = self.running
            if isinstance(work.request, messages.Status) and running is not None:
                work.send(messages.Result(id=work.request.id, data=self._status(running)))
                return
            if isinstance(work.request, messages.Shutdown) and not self._may_end(work.request, work):
                return
            self._queue.append(work)
            self._state.notify()

    def _may_end(self, request: messages.Shutdown, work: Job) -> bool:
        """Whether the sidecar may end now: then everything that is under way is cancelled; else the reply is sent."""
        known = [*([self.running] if self.running else []), *self._queue]
        foreign = [each for each in known if not each.cancelled and each.connection is not work.connection]
        if foreign and not request.force:
            work.send(
                messages.Failure(
                    id=request.id,
                    code="user",
                    message=f"The sidecar is at work for another client ({foreign[0].doing}).",
                    hint="Wait until that is done, or end it all the same with `python cli stop --force`.",
                )
            )
            return False
        self._drop(lambda _: True, stopped_by=request.by or "another client")
        return True

    def _cancel(self, connection: Connection, request: int) -> None:
        with self._state:
            self._drop(lambda work: work.connection is connection and work.request.id == request)

    def _drop(self, chosen: Callable[[Job], bool], stopped_by: str = "") -> None:
        """Cancel the running work if chosen (it ends at its next step) and reply to the chosen waiting ones now."""
        if self.running is not None and not self.running.cancelled and chosen(self.running):
            self.running.cancel(stopped_by)
        for work in [work for work in self._queue if chosen(work)]:
            self._queue.remove(work)
            work.cancel(stopped_by)
            work.send(work.why_cancelled("Cancelled before it began."))

    def _forget(self, connection: Connection) -> None:
        with self._state:
            self._connections.discard(connection)
            self._drop(lambda work: work.connection is connection)
        connection.close()

    @staticmethod
    def _keep_alive(sock: socket.socket) -> None:
        """Notice within a minute that a client's host is gone."""
        if sock.family == socket.AF_UNIX:
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 4)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def listen(address: str, path: Path) -> socket.socket:
    """A listening socket for "unix" (at `path`) or "tcp://host:port". Raises `OSError` when it is taken."""
    if address == "unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with addresses.unix_path(path) as short:
            sock.bind(short)
        sock.listen(MAX_CONNECTIONS)
        return sock
    host, port = addresses.split(address)
    return socket.create_server((host, port), family=addresses.family(host), backlog=MAX_CONNECTIONS)
