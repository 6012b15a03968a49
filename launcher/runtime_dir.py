"""The owner-only directory where sidecars keep their socket, records and logs.

<root>/<slot>/lock          held while a sidecar of this slot is started or stopped
<root>/<slot>/current       link to the life of the latest sidecar
<root>/<slot>/life-.../     one directory per life: see parallel_backend/protocol/records.py
<root>/vae/<slot>/...       the same of a second sidecar, for VAEs that have ranks of their own
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..parallel_backend.errors import UserError

KEPT_LIVES = 3
VAE_SLOT = "vae"
ROOT_VARIABLE = "PARALLELDIT_RUNTIME_DIR"


def root() -> Path:
    """`$PARALLELDIT_RUNTIME_DIR`, else a directory of this user under `$XDG_RUNTIME_DIR` or the temporary directory."""
    chosen = os.environ.get(ROOT_VARIABLE)
    if chosen:
        return Path(chosen).absolute()
    session = os.environ.get("XDG_RUNTIME_DIR")
    if session and os.access(session, os.W_OK):
        return Path(session) / "paralleldit"
    return Path(tempfile.gettempdir()) / f"paralleldit-{os.getuid()}"


class Slot:
    """The place of one sidecar: at most one lives in it at a time. Hosts of one sidecar use a slot each."""

    def __init__(self, node_rank: int = 0, directory: Path | None = None) -> None:
        self.directory = (directory or root()) / f"node-{node_rank}"

    @property
    def vae(self) -> Slot:
        """The slot of the VAE's own sidecar on this host."""
        return Slot(0, self.directory.parent / VAE_SLOT)

    @property
    def life(self) -> Path | None:
        """The directory of the latest sidecar, dead or alive."""
        try:
            return self.directory / os.readlink(self.directory / "current")
        except OSError:
            return None

    def new_life(self) -> Path:
        """A fresh directory, made current. Older lives than the last few go, with their logs."""
        _private(self.directory)
        others = sorted(self.directory.glob("life-*"))
        life = self.directory / f"life-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}"
        life.mkdir(mode=0o700)
        link = self.directory / f".current.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(life.name)
        link.replace(self.directory / "current")
        for old in others[: -(KEPT_LIVES - 1)]:
            shutil.rmtree(old, ignore_errors=True)
        return life

    @contextlib.contextmanager
    def lock(self, timeout: float, on_wait: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """Only one process at a time starts or stops the sidecar of this slot."""
        _private(self.directory)
        with open(self.directory / "lock", "a") as file:
            deadline, said = time.monotonic() + timeout, False
            while not _try_lock(file.fileno()):
                if time.monotonic() > deadline:
                    raise UserError(
                        f"Another process has held {self.directory} for {timeout:g} s, to start or stop its sidecar.",
                        "Wait for it, or end it.",
                    )
                if not said:
                    on_wait("waiting for another process that starts or stops the sidecar")
                    said = True
                time.sleep(0.05)
            yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _private(directory: Path) -> None:
    """Make `directory` and its parent; refuse them when another user could write into them."""
    for each in (directory.parent, directory):
        each.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = each.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise UserError(
                f"{each} must be a directory that only its owner (user {os.getuid()}) can read and write.",
                f"It has owner {found.st_uid} and mode {stat.S_IMODE(found.st_mode):o}. "
                f"Remove it, or name another one in {ROOT_VARIABLE}.",
            )
