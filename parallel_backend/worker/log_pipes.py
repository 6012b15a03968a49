"""Rank output to bounded log files. The torchrun agent owns the files and each rank writes into a named pipe, so that
neither a full disk nor a flood of output can hurt a rank, and the last words of a killed rank are kept."""

from __future__ import annotations

import os
import selectors
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

READ_BYTES = 1 << 16


def pipe_path(log: Path) -> Path:
    return log.with_suffix(".pipe")


def attach(log: Path) -> None:
    """Send this process's stdout and stderr into the pipe of `log`."""
    pipe = os.open(pipe_path(log), os.O_WRONLY)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    os.close(pipe)


class BoundedLog:
    """A file of at most `limit` bytes and its predecessor `<name>.1`. Failed writes are dropped; of the first `report`
    is given the error's number."""

    def __init__(self, path: Path, limit: int, report: Callable[[int], None]) -> None:
        self.path = path
        self._limit = limit
        self._report = report
        self._reported = False

    def write(self, data: bytes) -> None:
        try:
            self._append(data)
        except OSError as error:
            if not self._reported:
                self._reported = True
                self._report(error.errno or 0)

    def _append(self, data: bytes) -> None:
        if self.path.exists() and self.path.stat().st_size + len(data) > self._limit:
            self.path.replace(self.path.with_name(f"{self.path.name}.1"))
        with open(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0) as file:
            file.write(data)


class LogPump(threading.Thread):
    """Carries what arrives in the pipes to their logs."""

    def __init__(self, logs: Mapping[Path, BoundedLog]) -> None:
        super().__init__(name="log pump", daemon=True)
        self._selector = selectors.DefaultSelector()
        for path, log in logs.items():
            os.mkfifo(path, 0o600)
            # Opened for writing too: the pipe then never ends while a rank has yet to open it.
            self._selector.register(os.open(path, os.O_RDWR | os.O_NONBLOCK), selectors.EVENT_READ, log)

    def run(self) -> None:
        while True:
            self._pump(timeout=None)

    def drain(self) -> None:
        """Carry what is left, after the writers have ended."""
        while self._pump(timeout=0.1):
            pass

    def _pump(self, timeout: float | None) -> bool:
        ready = self._selector.select(timeout)
        for key, _ in ready:
            try:
                key.data.write(os.read(key.fd, READ_BYTES))
            except BlockingIOError:
                continue  # the other of `run` and `drain` was faster
        return bool(ready)
