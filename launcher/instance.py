"""One instance of a sidecar, read from its directory: its processes, whether they live, why they ended."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import time
from pathlib import Path

from ..parallel_backend.protocol import records

TAIL_BYTES = 16_384
KNOWN_FAULTS = (
    (
        r"No module named '?([\w.]+)",
        "The sidecar's Python has no module {0}.",
        "Install the pack's requirements into it.",
    ),
    (
        r"(?:EADDRINUSE|[Aa]ddress already in use)",
        "The port that the sidecar needs is taken.",
        "Choose another port, or end the program that holds it.",
    ),
    (
        r"(?:Too many open files|EMFILE)",
        "The limit of open files is too low for the ranks.",
        "Raise it: ulimit -n 1024.",
    ),
    (
        r"(?:No space left on device)",
        "The disk is full.",
        "Free space, or name another directory in PARALLELDIT_RUNTIME_DIR.",
    ),
    (
        r"(?:CUDA out of memory|DefaultCPUAllocator|MemoryError|Cannot allocate memory)",
        "There is not enough memory to start the sidecar.",
        "Free memory that other programs hold, or use fewer ranks.",
    ),
)


class SidecarInstance:
    """The sidecar of the directory `path`. Nothing here blocks longer than it says."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def settings(self) -> records.Settings | None:
        return records.read(self.path / records.SettingsFile, records.Settings)

    @property
    def agent(self) -> records.Process | None:
        return records.read(self.path / records.AgentFile, records.Process)

    @property
    def owner(self) -> records.Process | None:
        return records.read(self.path / records.OwnerFile, records.Process)

    @property
    def end(self) -> records.End | None:
        return records.read(self.path / records.EndFile, records.End)

    @property
    def is_ready(self) -> bool:
        return (self.path / records.ReadyFile).exists()

    @property
    def is_alive(self) -> bool:
        return self.agent is not None and self.agent.alive

    @property
    def is_whole(self) -> bool:
        """Whether torchrun and all ranks of this host live: one that has just lost a rank still has its torchrun."""
        settings, ranks = self.settings, self.ranks
        if not self.is_alive or settings is None or len(ranks) < len(settings.local_ranks):
            return False
        return all(rank.alive for rank in ranks.values())

    @property
    def ranks(self) -> dict[int, records.Process]:
        """The rank processes of this host that have begun, dead or alive."""
        settings = self.settings
        found = {
            rank: records.read(self.path / records.rank_file(rank), records.Process)
            for rank in (settings.local_ranks if settings else ())
        }
        return {rank: process for rank, process in found.items() if process}

    @property
    def stopped(self) -> dict[str, int]:
        """Its processes that a signal or a debugger has stopped: {what it is: pid}."""
        named = {**({"torchrun": self.agent} if self.agent else {}), **{f"rank {n}": p for n, p in self.ranks.items()}}
        return {name: process.pid for name, process in named.items() if process.is_stopped}

    def own(self, owner: records.Process | None) -> None:
        """The sidecar ends some time after `owner` does; without an owner it lives until it is stopped or idle."""
        if owner is None:
            (self.path / records.OwnerFile).unlink(missing_ok=True)
        else:
            records.write(self.path / records.OwnerFile, owner)

    def kill(self, patience: float = 0.0) -> None:
        """End every process of this life: first wait `patience` seconds for them to leave, then kill.

        The ranks are in sessions of their own and die one by one; the agent goes last, for it writes down why.
        """
        _wait(self._processes(), patience)
        _signal(list(self.ranks.values()), signal.SIGKILL)
        agent = [self.agent] if self.agent else []
        if not _wait(agent, 1.0):
            _signal(agent, signal.SIGTERM)
            if not _wait(agent, 2.0):
                _signal(agent, signal.SIGKILL)
        _signal(list(self.ranks.values()), signal.SIGKILL)
        _wait(self._processes(), 5.0)

    def why(self, patience: float = 3.5) -> tuple[str, str]:
        """Cause of the end and what to do, waiting at most `patience` seconds until somebody has written it down."""
        deadline = time.monotonic() + patience
        while self.end is None and self.is_alive and time.monotonic() < deadline:
            time.sleep(0.02)
        end = self.end
        if end is not None:
            return end.message, end.hint
        dead = [f"{rank} (process {process.pid})" for rank, process in self.ranks.items() if not process.alive]
        if self.is_alive and dead:
            return f"Rank {dead[0]} is gone.", ""
        if self.is_alive:
            return "The sidecar runs, but the connection to it is lost.", ""
        agent = self.agent
        return f"The sidecar's torchrun (process {agent.pid if agent else 'unknown'}) ended without a word.", ""

    def why_not_started(self) -> tuple[str, str]:
        """Explains a failed start: as `why`, after a search of the logs for known failures."""
        message, hint = self.why(patience=1.0)
        text = "\n".join([message, self.tail(), *(self.tail(rank) for rank in self.ranks)])
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        limited = (
            "" if limit == resource.RLIM_INFINITY else f" Its memory is limited to {limit / 1e9:.1f} GB (ulimit -v)."
        )
        for pattern, known, remedy in KNOWN_FAULTS:
            found = re.search(pattern, text)
            if found:
                return known.format(*found.groups()) + limited, remedy
        return message + limited, hint

    def tail(self, rank: int | None = None) -> str:
        """The end of a rank's log, or of torchrun's."""
        log = self.path / (records.AgentLog if rank is None else records.rank_log(rank))
        try:
            with open(log, "rb") as file:
                file.seek(max(0, log.stat().st_size - TAIL_BYTES))
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def _processes(self) -> list[records.Process]:
        return [*self.ranks.values(), *([self.agent] if self.agent else [])]


def _signal(processes: list[records.Process], number: signal.Signals) -> None:
    for process in processes:
        if process.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _wait(processes: list[records.Process], seconds: float) -> bool:
    """Whether all have ended within `seconds`."""
    deadline = time.monotonic() + seconds
    while any(process.alive for process in processes):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True
