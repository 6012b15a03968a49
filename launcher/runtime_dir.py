"""The owner-only directory where sidecars keep their socket, records and logs.

<root>/<slot>/lock          held while a sidecar of this slot is started or stopped
<root>/<slot>/current       link to the life of the latest sidecar
<root>/<slot>/life-.../     one directory per life: see parallel_backend/protocol/records.py
<root>/vae/<slot>/...       the same of a second sidecar, for VAEs that have ranks of their own
"""

from __future__ import annotations

import contextlib
import errno
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
ELSEWHERE = f"Name another directory in {ROOT_VARIABLE}."
CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "it is a file",
    errno.ENAMETOOLONG: "the path is too long",
    errno.ELOOP: "the path is a loop of links",
    errno.EFBIG: "the size of files is limited (ulimit -f)",
    errno.EMFILE: "too many files are open (ulimit -n)",
}
"""Of what goes wrong when a file is written."""


def root() -> Path:
    """`$PARALLELDIT_RUNTIME_DIR`, else the first of the usual places that can be used."""
    chosen = os.environ.get(ROOT_VARIABLE)
    if chosen:
        return Path(chosen).absolute()
    places = usual_places()
    return next((place for place in places if not trouble(place)), places[0])


def usual_places() -> list[Path]:
    """Where the directory of this user lies: in the session's, or in the temporary one."""
    user = os.getuid()
    sessions = [os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{user}"]
    places = [Path(session) / "paralleldit" for session in sessions if session and os.access(session, os.W_OK)]
    temporary = [tempfile.gettempdir(), "/tmp", "/var/tmp"]
    return list(dict.fromkeys([*places, *(Path(each) / f"paralleldit-{user}" for each in temporary)]))


def passed_over() -> list[str]:
    """What is wrong with the usual places that come before the one in use."""
    if os.environ.get(ROOT_VARIABLE):
        return []
    places, used = usual_places(), root()
    return [trouble(place) for place in places[: places.index(used)]]


def slots(node_rank: int = 0) -> list[Slot]:
    """Where a sidecar of this user may run: in the place that is in use, then in the other usual ones."""
    places = [root(), *([] if os.environ.get(ROOT_VARIABLE) else usual_places())]
    private = [place for place in dict.fromkeys(places) if place.exists() and not trouble(place)]
    return [Slot(node_rank, place) for place in private or places[:1]]


def trouble(place: Path) -> str:
    """Why `place` cannot hold the directories of sidecars, a whole sentence; "" if it can."""
    try:
        found = place.lstat()
    except FileNotFoundError:
        return "" if os.access(_existing(place), os.W_OK | os.X_OK) else _cannot(place, CAUSES[errno.EACCES])
    except OSError as error:
        return _cannot(place, CAUSES.get(error.errno or 0, str(error.strerror)))
    if not stat.S_ISDIR(found.st_mode):
        return _cannot(place, "it is a file or a link")
    if found.st_uid != os.getuid():
        return _cannot(place, f"it belongs to user {found.st_uid}, this one is {os.getuid()}")
    for entry in (place, *place.glob("node-*")):
        status = entry.lstat()
        if status.st_uid != os.getuid():
            return _cannot(place, f"{entry.name} in it belongs to user {status.st_uid}")
        if not os.access(entry, os.W_OK | os.X_OK):
            return _cannot(place, CAUSES[errno.EACCES])
    if found.st_mode & 0o077:
        return _cannot(
            place, f"others may enter it: only its owner may, and its mode is {stat.S_IMODE(found.st_mode):o}"
        )
    return ""


def _cannot(place: Path, why: str) -> str:
    return f"{place} cannot hold the sidecar's files: {why}."


def _existing(place: Path) -> Path:
    return next(each for each in place.parents if each.exists())


@contextlib.contextmanager
def explained(directory: Path) -> Iterator[None]:
    """Raises `UserError` for an `OSError` of the file system of `directory`."""
    try:
        yield
    except OSError as error:
        if error.errno not in CAUSES:
            raise
        raise UserError(_cannot(directory, CAUSES[error.errno]), ELSEWHERE) from error


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
        private(self.directory)
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
        private(self.directory)
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


def private(directory: Path) -> None:
    """Make `directory` and its parent. Raises `UserError` where they cannot be used, or other users could enter."""
    for each in (directory.parent, directory):
        with explained(each):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        if why := trouble(each):
            raise UserError(why, f"Remove it, or name another directory in {ROOT_VARIABLE}.")
