"""Which files lie under a path, and in which state: looked at once a run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class FileState(NamedTuple):
    """A file that is replaced has another state."""

    path: Path
    size: int
    modified_ns: int


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
        """Of the file, or of all files of the folder, in the order of their names; of nothing where there is none."""
        if path not in self._seen:
            self._seen[path] = _look(Path(path))
        return self._seen[path]


def _look(path: Path) -> tuple[FileState, ...]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    statuses = ((file, file.stat()) for file in files if file.is_file())
    return tuple(FileState(file, status.st_size, status.st_mtime_ns) for file, status in statuses)
