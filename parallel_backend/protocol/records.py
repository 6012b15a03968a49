"""Records that launcher and ranks exchange as files of the sidecar's own directory (one directory per instance)."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from .messages import Message

SettingsFile = "settings.json"
OwnerFile = "owner.json"
AgentFile = "agent.json"
ReadyFile = "ready.json"
EndFile = "end.json"
TokenFile = "token"
SocketFile = "socket"
BoardFile = "board"
"""What the ranks of one host tell each other outside of collectives."""
GroupsFile = "groups"
"""Where the ranks of one host form their groups."""
AgentLog = "torchrun.log"

log = logging.getLogger(__name__)

Record = TypeVar("Record", bound=Message)


class Settings(Message):
    """How the launcher wants the ranks of one host to run. Times in seconds; 0 for `idle_timeout` means never."""

    key: str
    device: Literal["cpu", "cuda"]
    address: str
    ranks: int
    nnodes: int
    node_rank: int
    compute_timeout: float
    hang_timeout: float
    idle_timeout: float
    grace: float
    max_body: int
    log_bytes: int
    worker: str
    store: str
    gpus: tuple[int, ...] = ()

    @property
    def local_ranks(self) -> range:
        count = self.ranks // self.nnodes
        return range(self.node_rank * count, (self.node_rank + 1) * count)


class Process(Message):
    """A process. Its start time (clock ticks since boot) distinguishes it from a later one of the same pid."""

    pid: int
    started: int

    @property
    def alive(self) -> bool:
        return self.started == started(self.pid)

    @property
    def is_stopped(self) -> bool:
        """Whether it lives, but a signal or a debugger has stopped it."""
        fields = _stat(self.pid)
        return self.alive and fields is not None and fields[0] in (b"T", b"t")


class Ready(Message):
    """Written by each host's first rank when all ranks have met."""

    device: str
    seconds: float


class End(Message):
    """Why the sidecar ended. The first to know writes it. `clean`: it was asked to, or had nothing left to do;
    `is_killed`: a signal ended one of its processes."""

    clean: bool
    message: str
    hint: str = ""
    rank: int | None = None
    is_killed: bool = False


class MappedFile(Message):
    """A file as it was when a rank mapped it into its memory."""

    path: str
    size: int
    modified_ns: int
    inode: int


class MappedFiles(Message):
    files: tuple[MappedFile, ...]


def mapped_file(rank: int) -> str:
    """What the rank holds, for those who ask why it was killed by SIGBUS."""
    return f"mapped-{rank}.json"


def rank_file(rank: int) -> str:
    return f"rank-{rank}.json"


def failed_file(sequence: int) -> str:
    """Of the request of that number, while it is under way."""
    return f"failed-{sequence}.json"


def rank_log(rank: int) -> str:
    return f"rank-{rank}.log"


def started(pid: int) -> int | None:
    """Start time of a living process in clock ticks since boot; None when there is none or it is a zombie."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in (b"Z", b"X") else int(fields[19])


def _stat(pid: int) -> list[bytes] | None:
    """The fields of a process from its state on, as in proc_pid_stat(5)."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None


def this_process() -> Process:
    pid = os.getpid()
    return Process(pid=pid, started=started(pid) or 0)


def write(path: Path, record: Message) -> None:
    """All of the file or nothing of it, readable by the owner only."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    _write_private(part, record)
    part.replace(path)


def write_first(path: Path, record: Message) -> None:
    """Writes `record` unless one is already there, which stays. A disk that is full loses nothing else."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write_private(part, record)
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
        part.unlink()
    except OSError as error:
        log.warning("%s could not be written: %s", path, error)


def read(path: Path, kind: type[Record]) -> Record | None:
    """Reads a record; None when there is none, or one of another version of the pack."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def _write_private(path: Path, record: Message) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(record.model_dump_json())
