"""What the nodes learn of the sidecar while it works, for those who watch: the panel in ComfyUI's sidebar."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import ParamSpec, TypeVar

from ...launcher.client import Event, SidecarError
from ...parallel_backend.errors import Cancelled, UserError
from ...parallel_backend.protocol.errors import ProtocolError
from ...parallel_backend.protocol.messages import (
    Evaluations,
    Log,
    Memory,
    Predict,
    Progress,
    Request,
    Result,
    Sample,
)

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")

KNOWN_ERRORS = (UserError, SidecarError, ProtocolError)
FAILURES = (*KNOWN_ERRORS, Cancelled, OSError)
"""All that a request may end with: `Cancelled` too where nobody has asked for it, when another ends the sidecar."""


@dataclass(frozen=True)
class Phase:
    """What the ranks do now: `start`, or the type of a request until the request's events say more."""

    name: str
    step: int = 0
    total: int = 0
    text: str = ""


@dataclass(frozen=True)
class RunCost:
    """The last run of a layout: seconds, steps, and the bytes that rank 0 sent."""

    layout: str
    is_exact: bool
    ranks: int
    seconds: float
    steps: int
    sent_bytes: int


@dataclass(frozen=True)
class Fault:
    """The last error. `sidecar_failed`: the sidecar failed, and its log has details."""

    message: str
    hint: str
    sidecar_failed: bool


@dataclass(frozen=True)
class Snapshot:
    """`version` grows whenever what the ranks hold may have changed. `evaluations`: of the last run with a step cache,
    how many were computed in full, of how many; None once there was a run without one."""

    version: int = 0
    phase: Phase | None = None
    run: RunCost | None = None
    evaluations: tuple[int, int] | None = None
    memory_used: tuple[int, ...] = ()
    memory_free: tuple[int, ...] = ()
    error: Fault | None = None

    def to_json(self) -> dict[str, object]:
        return asdict(self)


class Activity:
    """Records events and calls every listener, in the thread of the event."""

    def __init__(self) -> None:
        self.now = Snapshot()
        self._lock = threading.Lock()
        self._listeners: list[Callable[[Snapshot], None]] = []

    def listen(self, listener: Callable[[Snapshot], None]) -> None:
        self._listeners.append(listener)

    @contextlib.contextmanager
    def during(self, phase: str | None = None) -> Iterator[None]:
        """What happens in here is noted: the phase, if it is known yet, its end, and the error that ends it."""
        if phase:
            self._note(phase=Phase(phase))
        try:
            yield
        except KNOWN_ERRORS as error:
            self.fail(error)
            raise
        finally:
            if self.now.phase:
                self._note(version=self.now.version + 1, phase=None)

    def starting(self, text: str) -> None:
        self._note(phase=Phase("start", text=text))

    def event(self, event: Event) -> None:
        match event:
            case Progress():
                self._note(phase=Phase(event.phase, event.step, event.total))
            case Memory():
                self._note(memory_used=event.used, memory_free=event.free)
            case Evaluations():
                self._note(evaluations=(event.computed, event.total))
            case Log():
                if self.now.phase:
                    self._note(phase=replace(self.now.phase, text=event.text))

    def done(self, message: Request, result: Result) -> None:
        """What a run has cost, from its result."""
        changes: dict[str, object] = {"error": None}
        if isinstance(message, Sample | Predict) and message.cache is None:
            changes["evaluations"] = None
        if not isinstance(message, Sample) or "traffic" not in result.data:
            self._note(**changes)
            return
        traffic, seconds = result.data["traffic"], result.data["seconds"]
        assert isinstance(traffic, dict)
        assert isinstance(seconds, float)
        run = RunCost(
            layout=str(message.layout),
            is_exact=message.layout.is_exact,
            ranks=message.layout.ranks,
            seconds=seconds,
            steps=self.now.phase.total if self.now.phase else 0,
            sent_bytes=sum(sent["bytes"] for sent in traffic.values()),
        )
        self._note(run=run, **changes)

    def fail(self, error: UserError | SidecarError | ProtocolError) -> None:
        message, hint = getattr(error, "message", str(error)), getattr(error, "hint", "")
        self._note(error=Fault(message, hint, isinstance(error, SidecarError)))

    def _note(self, **changes: object) -> None:
        with self._lock:
            self.now = snapshot = replace(self.now, **changes)
        for listener in self._listeners:
            listener(snapshot)


def noted(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """`function`, whose errors the panel shows, those too that never came to a request."""

    @functools.wraps(function)
    def during(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        with activity.during():
            return function(*args, **kwargs)

    return during


activity = Activity()
"""The activity of this process, whichever of its sidecars works."""
