"""The host's end of the connection to a sidecar."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..parallel_backend.errors import SHOWN_MODULE, Cancelled, UserError
from ..parallel_backend.machine.clock import RunningClock
from ..parallel_backend.protocol import addresses, frames, handshake, messages, records
from ..parallel_backend.protocol.errors import ProtocolError
from ..parallel_backend.protocol.tensors import unpack
from .instance import SidecarInstance

if TYPE_CHECKING:
    from pathlib import Path

    import torch

POLL_S = 0.05
"""How often a waiting request looks whether it has been cancelled."""

Tensors = dict[str, "torch.Tensor"]
Event = messages.Progress | messages.Log | messages.Memory | messages.Evaluations


class SidecarError(Exception):
    """The sidecar failed and is gone; the next request starts a new one."""

    __module__ = SHOWN_MODULE

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.message = message
        self.hint = hint


class NotBegun(SidecarError):
    """The sidecar was lost before its ranks had begun with the request, which a new one may be asked again."""

    __module__ = SHOWN_MODULE


class Client:
    """One connection. Safe to use from several threads: their requests go one after the other.

    `life` is the sidecar's directory when it runs on this host: then its end is explained, and its remains removed.
    """

    def __init__(
        self,
        stream: frames.FrameSocket,
        welcome: messages.Welcome,
        *,
        life: SidecarInstance | None = None,
        hang_timeout: float = 30.0,
    ) -> None:
        self.welcome = welcome
        self.life = life
        self._stream = stream
        self._hang_timeout = hang_timeout
        self._ids = itertools.count(1)
        self._turn = threading.Lock()
        self._inbox: queue.Queue[tuple[messages.Message, Tensors] | None] = queue.Queue()
        self._current = 0
        self._clock = RunningClock()
        self._heard, self._heard_at = 0.0, 0.0
        """When the sidecar was last heard, by the clock of the stream and by ours."""
        self._has_begun = False
        """Whether the ranks have begun with the current request."""
        self._lost = ""
        threading.Thread(target=self._read, name="sidecar reader", daemon=True).start()

    @classmethod
    def connect(
        cls,
        address: str,
        socket_path: Path,
        *,
        token: str = "",
        life: SidecarInstance | None = None,
        hang_timeout: float = 30.0,
        max_body: int = frames.MAX_BODY,
    ) -> Client:
        """Connects. Raises `OSError` when no process listens, `ProtocolError` when the sidecar refuses."""
        sock = addresses.connect(address, socket_path, timeout=5.0)
        stream = frames.FrameSocket(sock, max_body=max_body, stall_timeout=hang_timeout)
        try:
            welcome = handshake.greet(stream, token)
        except BaseException:
            stream.close()
            raise
        return cls(stream, welcome, life=life, hang_timeout=hang_timeout)

    @property
    def alive(self) -> bool:
        return not self._lost

    def close(self) -> None:
        self._lost = self._lost or "the connection was closed"
        self._stream.close()

    def leave(self, patience: float) -> None:
        """Cancels the request that is under way in another thread, and waits until the ranks have left it."""
        self._cancel()
        if self._turn.acquire(timeout=patience):
            self._turn.release()

    def request(
        self,
        message: messages.Request,
        tensors: Mapping[str, torch.Tensor] | None = None,
        on_event: Callable[[Event, Tensors], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        timeout: float | None = None,
    ) -> tuple[messages.Result, Tensors]:
        """The sidecar's reply to `message` (its id is set here). `on_event` and `cancelled` are called in this thread.

        Raises `Cancelled` once every rank has left the run, `UserError`, `SidecarError` when the sidecar is lost (of
        these `NotBegun` where nothing of the request is), and `TimeoutError` after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._turn:
            self._current = next(self._ids)
            self._inbox = queue.Queue()
            self._has_begun = False
            self._heard_at = self._clock.now()
            try:
                return self._exchange(message, tensors or {}, on_event, cancelled, deadline)
            except (Cancelled, UserError, SidecarError, ProtocolError):
                raise
            except BaseException:
                self._cancel()
                raise

    def _exchange(
        self,
        message: messages.Request,
        tensors: Mapping[str, torch.Tensor],
        on_event: Callable[[Event, Tensors], None] | None,
        cancelled: Callable[[], bool] | None,
        deadline: float | None,
    ) -> tuple[messages.Result, Tensors]:
        try:
            self._stream.send(message.model_copy(update={"id": self._current}), tensors)
        except OSError as error:
            raise self._bury(str(error)) from error
        is_cancelled = False
        while True:
            if cancelled and not is_cancelled and cancelled():
                is_cancelled = True
                self._cancel()
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError("The sidecar has not answered in time.")
            found = self._next()
            if found is None:
                continue
            reply, body = found
            if isinstance(reply, messages.Begun):
                self._has_begun = True
            elif isinstance(reply, Event):
                if on_event and not is_cancelled:
                    on_event(reply, body)
            elif isinstance(reply, messages.Failure):
                raise self._error(reply)
            elif is_cancelled:
                raise Cancelled("Cancelled.")
            elif isinstance(reply, messages.Result):
                return reply, body

    def _next(self) -> tuple[messages.Message, Tensors] | None:
        """What has arrived for this request; None when nothing has for a moment."""
        try:
            found = self._inbox.get(timeout=POLL_S)
        except queue.Empty:
            if self._lost:
                raise self._bury(self._lost) from None
            silence = self._silence()
            if silence > self._hang_timeout:
                raise self._bury(self._why_silent(silence), hangs=True) from None
            return None
        if found is None:
            raise self._bury(self._lost)
        return found

    def _silence(self) -> float:
        """Seconds for which nothing has come, not even a heartbeat, while this process could run."""
        now = self._clock.now()
        if self._heard != self._stream.last_received:
            self._heard, self._heard_at = self._stream.last_received, now
        return now - self._heard_at

    def _why_silent(self, silence: float) -> str:
        stopped = self.life.stopped if self.life else {}
        name, pid = next(iter(stopped.items()), ("rank 0", 0))
        why = f"process {pid} is stopped, by a signal or a debugger, and " if pid else ""
        return f"{name.capitalize()} hangs: {why}the sidecar has sent no heartbeat for {silence:.0f} s."

    def _cancel(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.send(messages.Cancel(id=self._current))

    def _error(self, failure: messages.Failure) -> Exception:
        """The exception for `failure`. If it names a rank, the ranks are out of step and the sidecar ends: its remains
        are removed."""
        hint = failure.hint
        if failure.rank is not None:
            self.close()
            if self.life is not None:
                self.life.kill(patience=0.5)
                hint = f"{hint} {self._log_hint(failure.rank)}".strip()
        match failure.code:
            case "cancelled":
                return Cancelled(failure.message)
            case "user":
                return UserError(failure.message, failure.hint)
            case "protocol":
                return ProtocolError(failure.message)
            case "crash":
                return (
                    self._lost_error(failure.message, hint)
                    if failure.rank is not None
                    else SidecarError(failure.message, hint)
                )

    def _bury(self, reason: str, *, hangs: bool = False) -> SidecarError:
        """Remove what is left of a lost sidecar, and say why it ended."""
        self.close()
        if self.life is None:
            return self._lost_error(f"The connection to the sidecar is lost: {reason}.")
        if hangs:
            rank = None if "torchrun" in self.life.stopped else 0
            records.write_first(self.life.path / records.EndFile, records.End(clean=False, message=reason, rank=rank))
        message, hint = self.life.why()
        if self.life.end is None:
            message = f"{message} ({reason})"
        self.life.kill(patience=0.0 if hangs else 0.5)
        end = self.life.end
        return self._lost_error(message, f"{hint} {self._log_hint(end.rank if end else None)}".strip())

    def _lost_error(self, message: str, hint: str = "") -> SidecarError:
        return (SidecarError if self._has_begun else NotBegun)(message, hint)

    def _log_hint(self, rank: int | None) -> str:
        assert self.life is not None
        name = records.AgentLog if rank is None else records.rank_log(rank)
        return f"The log is {self.life.path / name}."

    def _read(self) -> None:
        reason = "the sidecar closed the connection"
        try:
            while (frame := self._stream.receive()) is not None:
                message = frames.parse(messages.FROM_SIDECAR, frame.header)
                if getattr(message, "id", None) == self._current:
                    self._inbox.put((message, unpack(frame.body)))
        except (OSError, ValueError, ProtocolError) as error:
            reason = str(error)
        self._lost = self._lost or reason
        self._stream.close()
        self._inbox.put(None)
