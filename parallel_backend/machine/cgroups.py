"""The limits that a container sets: control groups of version 1 and 2, as Docker, Kubernetes and systemd use them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 60
"""Version 1 writes a number of this size where there is no limit."""
RECLAIMED = ("inactive_file", "active_file")
"""What a group holds of files that were read: the kernel drops it when memory is asked for."""


@dataclass(frozen=True)
class MemoryLimit:
    """Bytes that a group of processes may hold, and that it holds without what can be dropped."""

    limit: int
    used: int


@dataclass(frozen=True)
class Cgroups:
    """The groups of this process. `proc`: what it says of them; `mount`: where the kernel shows them."""

    proc: Path = Path("/proc/self/cgroup")
    mount: Path = Path("/sys/fs/cgroup")

    def memory(self) -> list[MemoryLimit]:
        """The limits of this process's group and of those around it."""
        found = []
        for folder in self._folders("memory"):
            limit = _number(folder, "memory.max", "memory.limit_in_bytes")
            used = _number(folder, "memory.current", "memory.usage_in_bytes")
            if limit is not None and used is not None and limit < UNLIMITED:
                found.append(MemoryLimit(limit, max(0, used - _reclaimable(folder))))
        return found

    def cores(self) -> float:
        """How many cores' worth of time its groups give this process; infinite without a limit."""
        return min((quota for folder in self._folders("cpu") if (quota := _quota(folder))), default=math.inf)

    def _folders(self, controller: str) -> Iterator[Path]:
        """A container may see its own group as the root, whatever its path is outside."""
        for line in _text(self.proc).splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                roots = [self.mount, self.mount / "unified"]
            elif controller in controllers.split(","):
                roots = [self.mount / controller, self.mount / controllers]
            else:
                continue
            for root in dict.fromkeys(roots):
                own = root / path.lstrip("/")
                yield from (each for each in (own, *own.parents) if each.is_relative_to(root) and each.is_dir())


def _quota(folder: Path) -> float | None:
    together = _text(folder / "cpu.max").split()
    quota, period = (
        together if len(together) == 2 else (_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    )
    return int(quota) / int(period) if quota.strip().isdecimal() and period.strip().isdecimal() else None


def _reclaimable(folder: Path) -> int:
    rows = (row.split() for row in _text(folder / "memory.stat").splitlines())
    table = {name: int(value) for name, value in rows}
    return sum(table.get(f"total_{name}", table.get(name, 0)) for name in RECLAIMED)


def _number(folder: Path, *names: str) -> int | None:
    texts = (_text(folder / name).strip() for name in names)
    return next((int(text) for text in texts if text.isdecimal()), None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
