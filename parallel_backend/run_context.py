"""One request in the rank: progress, cancel, preview."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from .distributed.control_group import ControlGroup
from .errors import Cancelled
from .files.states import FileState
from .protocol import messages

Send = Callable[[messages.Message, Mapping[str, torch.Tensor]], None]
"""Sends an event and its tensors to the client."""


class Run:
    """One request as the engine sees it: where it reports, and where it may be cancelled.

    `request`: its id; `send` is asked on rank 0 only. `is_cancelled`: rank 0 knows at once, the others soon after.
    `holds` is told which files this rank has mapped.
    """

    def __init__(
        self,
        control: ControlGroup,
        request: int,
        send: Send,
        is_cancelled: Callable[[], bool] = lambda: False,
        holds: Callable[[Sequence[FileState]], None] = lambda files: None,
    ) -> None:
        self._control = control
        self._request = request
        self._send = send
        self._is_cancelled = is_cancelled
        self.holds = holds

    def begun(self) -> None:
        """Tells the client that all ranks have its request; does nothing on ranks other than 0."""
        if self._control.rank == 0:
            self._send(messages.Begun(id=self._request), {})

    def progress(self, phase: messages.Phase, step: int, total: int, preview: torch.Tensor | None = None) -> None:
        """Sends the client an event; does nothing on ranks other than 0. `preview` [1, C, H, W] or [1, C, 1, H, W]."""
        if self._control.rank != 0:
            return
        event = messages.Progress(id=self._request, phase=phase, step=step, total=total)
        self._send(event, {} if preview is None else {"preview": preview.detach().cpu()})

    def log(self, level: Literal["info", "warning"], text: str) -> None:
        """A line for the client; nothing on ranks other than 0."""
        if self._control.rank == 0:
            self._send(messages.Log(id=self._request, level=level, text=text), {})

    def memory(self, used: int, free: int) -> None:
        """A collective: sends the client how many bytes every rank's device has in use and free."""
        ranks = self._control.gather([used, free])
        if self._control.rank == 0:
            used_by_rank, free_by_rank = zip(*ranks, strict=True)  # pyright: ignore[reportArgumentType]
            self._send(messages.Memory(id=self._request, used=used_by_rank, free=free_by_rank), {})

    def evaluations(self, computed: int, total: int) -> None:
        """Tells the client how many evaluations a step cache has left; does nothing on ranks other than 0."""
        if self._control.rank == 0:
            self._send(messages.Evaluations(id=self._request, computed=computed, total=total), {})

    def check_cancelled(self) -> None:
        """A collective: every rank calls it at every step, and all raise `Cancelled` together or none."""
        if self._control.agree(self._is_cancelled()):
            raise Cancelled("Cancelled.")

    def leave_if_cancelled(self) -> None:
        """Raises `Cancelled` on this rank alone, soon after the user has cancelled: in work that `all_or_none` does."""
        if self._is_cancelled():
            raise Cancelled("Cancelled.")

    def start_check(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        """A collective that no rank waits in: the call that it returns waits, for the largest of every rank's numbers,
        and raises `Cancelled` on all ranks where the user had cancelled before the check started."""
        wait = self._control.start_largest([int(self._is_cancelled()), *numbers])

        def finish() -> list[int]:
            cancelled, *largest = wait()
            if cancelled:
                raise Cancelled("Cancelled.")
            return largest

        return finish

    def gather(self, value: object) -> list[object]:
        """A collective: every rank's JSON value, in the order of ranks."""
        return self._control.gather(value)
