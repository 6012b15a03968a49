"""What a run prints."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ...parallel_backend.protocol.messages import Request, Sample, Welcome

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm


class Summary(NamedTuple):
    """How a picture was made, and when its run began."""

    lines: list[str]
    began: float


class Report:
    """What the terminal shows: a bar for every phase, and at the end where the picture is and how it was made."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._phase = ""
        self._sample: Sample | None = None
        self._welcome: Welcome | None = None
        self._step_times: list[float] = []
        self._thread = threading.get_ident()
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        if threading.get_ident() == self._thread:
            self._close_bar()
        print(text, file=sys.stderr)

    def sending(self, message: Request, welcome: Welcome) -> None:
        self._welcome = welcome
        if isinstance(message, Sample):
            self._sample = message
            self._step_times = []

    def progress(self, phase: str, step: int, total: int, preview: Tensor | None) -> None:
        from tqdm import tqdm

        if threading.get_ident() != self._thread:
            return  # the bar is that of the run that samples
        if phase == "sample":
            self._step_times.append(time.monotonic())
        if self._bar is None or phase != self._phase or step < self._bar.n:
            self._close_bar()
            self._phase = phase
            self._bar = tqdm(total=total, desc=phase, file=sys.stderr)
        self._bar.update(step - self._bar.n)
        if step == total:
            self._close_bar()

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        self._sample = None
        self._thread = threading.get_ident()
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._close_bar()

    def summary(self) -> Summary:
        """The summary of the run that has just sampled."""
        lines = []
        if self._sample is not None:
            lines.append(f"seed              {self._sample.seed}")
            if len(self._step_times) > 1:
                seconds = (self._step_times[-1] - self._step_times[0]) / (len(self._step_times) - 1)
                lines.append(f"seconds per step  {seconds:.3f}")
            lines.append(f"layout            {self._sample.layout}")
        if self._welcome is not None:
            lines.append(f"ranks             {self._welcome.ranks} on {self._welcome.device}")
        return Summary(lines, self._began)

    def end(self, summary: Summary, outputs: dict[str, Any]) -> None:
        for ui in outputs.values():
            for picture in ui.get("images", ()):
                print(f"picture           {picture['path']}")
            for text in ui.get("text", ()):
                print(text)
        print(*summary.lines, f"whole run         {time.monotonic() - summary.began:.1f} s", sep="\n")

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
