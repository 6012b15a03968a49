"""Notices a rank whose main thread waits for a file that never answers: a pipe, or a network drive that is gone."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import FrameType

from ..machine.clock import RunningClock

READERS = (
    *(f"/parallel_backend/{folder}/" for folder in ("files", "weights", "text", "vae/files", "adapters")),
    *("/pathlib.py", "/genericpath.py", "/posixpath.py", "/transformers/", "/safetensors/", "/json/"),
)
"""Where files are looked at and read. A rank may stand still for long elsewhere: it waits for others, or for a GPU."""


class Stall:
    """The main thread of this process, seen from another one. `look` is to be called every second or so."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._thread = threading.main_thread()
        self._cpu_clock = time.pthread_getcpuclockid(self._thread.ident or 0)
        self._clock = RunningClock()
        self._spent, self._since = -1.0, 0.0

    def look(self) -> str:
        """Where it has stood still for longer than the limit, waiting for a file; "" unless it has."""
        now, spent = self._clock.now(), time.clock_gettime(self._cpu_clock)
        if spent != self._spent:
            self._spent, self._since = spent, now
        frame = sys._current_frames().get(self._thread.ident or 0)
        if now - self._since <= self._limit or frame is None or not (_reads(frame) or self._is_in_disk_sleep()):
            return ""
        place = f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"
        return f"it has waited {now - self._since:.0f} s for a file, in {place}"

    def _is_in_disk_sleep(self) -> bool:
        status = Path(f"/proc/self/task/{self._thread.native_id}/stat").read_bytes()
        return status.rpartition(b")")[2].split()[0] == b"D"


def _reads(frame: FrameType) -> bool:
    return any(reader in frame.f_code.co_filename for reader in READERS)
