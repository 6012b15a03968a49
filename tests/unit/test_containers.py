"""The limits of containers: as files of control groups of both versions have them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from paralleldit.parallel_backend.machine import resources
from paralleldit.parallel_backend.machine.cgroups import Cgroups

GB = 10**9
UNLIMITED_V1 = 9223372036854771712

MACHINES = {
    "version 2, in a container": (
        "0::/\n",
        {"memory.max": 3 * GB, "memory.current": 2 * GB, "memory.stat": f"anon 9\ninactive_file {GB}\nactive_file 0"}
        | {"cpu.max": "150000 100000"},
        [(3 * GB, GB)],
        1.5,
    ),
    "version 2, a systemd slice with a limit": (
        "0::/user.slice/job.scope\n",
        {"user.slice/memory.max": 4 * GB, "user.slice/memory.current": GB, "user.slice/job.scope/memory.max": "max"}
        | {"user.slice/job.scope/memory.current": GB, "user.slice/job.scope/cpu.max": "max 100000"},
        [(4 * GB, GB)],
        math.inf,
    ),
    "version 1, Docker without a namespace": (
        "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n",
        {"memory/memory.limit_in_bytes": 2 * GB, "memory/memory.usage_in_bytes": 2 * GB - 1}
        | {"memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GB}\ntotal_active_file 5"}
        | {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"},
        [(2 * GB, GB - 6)],
        4.0,
    ),
    "version 1 and 2 together": (
        "3:memory:/job\n0::/job\n",
        {"memory/job/memory.limit_in_bytes": GB, "memory/job/memory.usage_in_bytes": 7}
        | {"memory/memory.limit_in_bytes": UNLIMITED_V1, "memory/memory.usage_in_bytes": 8 * GB}
        | {"unified/job/memory.max": "max", "unified/job/memory.current": 9},
        [(GB, 7)],
        math.inf,
    ),
    "no limits": ("0::/\n", {"cpu.max": "max 100000"}, [], math.inf),
    "no groups": ("", {}, [], math.inf),
}


@pytest.mark.parametrize("name", MACHINES)
def test_the_limits_of_a_container_are_found(tmp_path: Path, name: str):
    proc, files, memory, cores = MACHINES[name]
    (tmp_path / "proc").write_text(proc)
    for file, content in files.items():
        (tmp_path / "sys" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / file).write_text(f"{content}\n")
    groups = Cgroups(tmp_path / "proc", tmp_path / "sys")
    assert [(each.limit, each.used) for each in groups.memory()] == memory
    assert groups.cores() == cores
    found = resources.memory(groups)
    free = resources.memory(Cgroups(tmp_path / "none")).available
    for limit, used in memory:
        assert found.total <= limit
        assert found.available <= limit - used
    assert memory or found.available == pytest.approx(free, rel=0.5)
    assert resources.cores(groups) <= max(1, math.ceil(cores) if cores < 99 else 999)
