"""Opens regular files only, and asks file systems with a time limit: a pipe or a dead network drive blocks for ever."""

from __future__ import annotations

import os
import queue
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from ..errors import UserError

ANSWER_S = 20.0
"""A disk that sleeps needs some 10 s."""

T = TypeVar("T")


def open_regular(path: Path) -> BinaryIO:
    """The file `path` for reading. Raises `OSError`, and `UserError` where it is a pipe, a device or a folder: to open
    one of these may wait for ever, or do something."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise UserError(f"{path} is not a regular file.", "Check the path.")


def check_regular(folder: Path) -> None:
    """Raises `UserError` where `folder`, which another library will read, holds a pipe, a socket or a device."""
    for entry in folder.iterdir():
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise UserError(f"{entry} is not a regular file.", "Remove it.")


def in_time(path: object, look: Callable[[], T], limit: float = ANSWER_S) -> T:
    """What `look` returns or raises, which asks the file system of `path`. Raises `UserError` where it takes longer
    than `limit` seconds; its thread is left behind, for nothing can wake it."""
    answers: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((look(), None))
        except (UserError, OSError, ValueError) as error:
            answers.put((None, error))

    threading.Thread(target=ask, name="file system", daemon=True).start()
    try:
        answer, error = answers.get(timeout=limit)
    except queue.Empty:
        raise UserError(
            f"{path}: the file system has not answered for {limit:g} s.", "Is it a network drive that is gone?"
        ) from None
    if error is not None:
        raise error
    return answer  # pyright: ignore[reportReturnType]
