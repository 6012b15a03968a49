"""One request in the rank: progress, cancel, preview."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from .distributed.control_group import Control
from .errors import Cancelled
from .protocol import messages
from .worker.server import Work


class Run:
    """One request as the engine sees it: where it reports, and where it may be cancelled."""

    def __init__(self, control: Control, work: Work) -> None:
        self._control = control
        self._work = work

    def progress(self, phase: messages.Phase, step: int, total: int, preview: torch.Tensor | None = None) -> None:
        """Tell the client; nothing on ranks other than 0. `preview` [1, C, H, W]."""
        if self._control.rank != 0:
            return
        event = messages.Progress(id=self._work.request.id, phase=phase, step=step, total=total)
        self._work.progress = event
        self._work.send(event, {} if preview is None else {"preview": preview.detach().cpu()})

    def log(self, level: Literal["info", "warning"], text: str) -> None:
        """A line for the client; nothing on ranks other than 0."""
        if self._control.rank == 0:
            self._work.send(messages.Log(id=self._work.request.id, level=level, text=text))

    def memory(self, used: int, free: int) -> None:
        """A collective: tell the client how many bytes every rank's device has in use and free."""
        ranks = self._control.gather([used, free])
        if self._control.rank == 0:
            used_by_rank, free_by_rank = zip(*ranks, strict=True)  # pyright: ignore[reportArgumentType]
            self._work.send(messages.Memory(id=self._work.request.id, used=used_by_rank, free=free_by_rank))

    def check_cancelled(self) -> None:
        """A collective: every rank calls it at every step, and all raise `Cancelled` together or none."""
        if self._control.agree(self._work.cancelled):
            raise Cancelled("Cancelled.")

    def start_check(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        """A collective that no rank waits in: the call that it returns waits, for the largest of every rank's numbers,
        and raises `Cancelled` on all ranks where the user had cancelled before the check started."""
        wait = self._control.start_largest([int(self._work.cancelled), *numbers])

        def finish() -> list[int]:
            cancelled, *largest = wait()
            if cancelled:
                raise Cancelled("Cancelled.")
            return largest

        return finish

    def gather(self, value: object) -> list[object]:
        """A collective: every rank's JSON value, in the order of ranks."""
        return self._control.gather(value)
