"""Which files lie under a path, and in which state: looked at once a run."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .regular import in_time

MOST_ENTRIES = 10_000
"""In the folder of a model, a pipeline's with all its parts."""


class FileState(NamedTuple):
    """A file that is replaced or changed has another state."""

    path: Path
    size: int
    modified_ns: int
    inode: int

    def is_overwritten(self) -> bool:
        """Whether this very file has other contents now: then so has what was mapped of it. One that was replaced or
        removed stays as it was for those who have it."""
        try:
            now = self.path.stat()
        except OSError:
            return False
        return now.st_ino == self.inode and (now.st_size, now.st_mtime_ns) != (self.size, self.modified_ns)


class FileStates:
    """What was seen of files in this run. The same path has the same answer until the next one."""

    def __init__(self) -> None:
        self._run: str | None = None
        self._seen: dict[str, tuple[FileState, ...]] = {}

    def begin(self, run: str | None = None) -> None:
        """Look again, unless it is still the same `run`."""
        if run is None or run != self._run:
            self._seen.clear()
        self._run = run

    def under(self, path: str) -> tuple[FileState, ...]:
        """Of the file, or of all files of the folder, in the order of their names; of nothing where there is none.

        Raises `UserError` where the file system does not answer, or the folder is none of a model.
        """
        if path not in self._seen:
            self._seen[path] = in_time(path, partial(_look, Path(path)))
        return self._seen[path]


def _look(path: Path) -> tuple[FileState, ...]:
    try:
        entries = [path]
        if path.is_dir():
            entries = list(islice(path.rglob("*"), MOST_ENTRIES + 1))
            if len(entries) > MOST_ENTRIES:
                raise UserError(f"{path} holds more than {MOST_ENTRIES} files.", "Give the folder of one model.")
        statuses = [(file, file.stat()) for file in sorted(entries) if file.is_file()]
    except OSError:
        # What is wrong with it is told when it is opened.
        return ()
    return tuple(FileState(file, status.st_size, status.st_mtime_ns, status.st_ino) for file, status in statuses)
