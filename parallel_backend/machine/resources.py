"""The memory and the cores that this process has, in a container as well."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import psutil

from .cgroups import Cgroups

OWN = Cgroups()


class Memory(NamedTuple):
    """Bytes of the host's memory, or of as much as its container may have."""

    available: int
    total: int


def memory(groups: Cgroups = OWN) -> Memory:
    host = psutil.virtual_memory()
    limits = groups.memory()
    return Memory(
        available=min([host.available, *(max(0, each.limit - each.used) for each in limits)]),
        total=min([host.total, *(each.limit for each in limits)]),
    )


def cores(groups: Cgroups = OWN) -> int:
    """Cores that this process may use, at least one."""
    affinity = len(os.sched_getaffinity(0))
    quota = groups.cores()
    return affinity if math.isinf(quota) else max(1, min(affinity, math.ceil(quota)))
