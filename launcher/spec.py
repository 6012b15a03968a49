"""What a sidecar is started with: devices, settings, the code's version, checked."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..parallel_backend.errors import UserError
from ..parallel_backend.machine import resources
from ..parallel_backend.protocol import addresses, frames, records
from . import devices
from .host_checks import check_cores
from .runtime_dir import Slot

COMPUTE_TIMEOUT_S = {"cpu": 1800.0, "cuda": 600.0}
"""How long a rank waits for its peers inside the work: a stage of CPU ranks may compute for long before the next one
hears of it, and CUDA ranks may compile or tune kernels meanwhile."""


REMOTE_VARIABLE = "PARALLELDIT_REMOTE"
"""tcp://host:port of a sidecar that was started elsewhere."""
TOKEN_VARIABLE = "PARALLELDIT_TOKEN_FILE"
"""The file with its token."""


@dataclass(frozen=True)
class SidecarSpec:
    """The sidecar that somebody wants. Times in seconds.

    `ranks` counts all hosts; 0 means all GPUs, or two ranks on CPU. `address` is "unix" or "tcp://host:port"; TCP needs
    `token_file`. With `remote` the sidecar at that address is somebody else's to start and stop. Several hosts:
    `nnodes`, this host's `node_rank`, and `rdzv_endpoint` "host:port" of host 0. `compute_timeout` 0 means the device's
    usual one, `idle_timeout` 0 never. `worker` is the module that every rank runs. `gpus`: those that the ranks take
    on this host, by their places among the visible ones; none: the first ones.
    """

    ranks: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    python: str = sys.executable
    address: str = "unix"
    token_file: Path | None = None
    remote: bool = False
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str = ""
    start_timeout: float = 180.0
    compute_timeout: float = 0.0
    hang_timeout: float = 30.0
    idle_timeout: float = 1800.0
    grace: float = 60.0
    max_body: int = frames.MAX_BODY
    log_bytes: int = 16 << 20
    worker: str = "parallel_backend.worker"
    directory: Path | None = None
    gpus: tuple[int, ...] = ()

    @property
    def slot(self) -> Slot:
        return Slot(self.node_rank, self.directory)

    def for_vae(self, ranks: int, gpus: tuple[int, ...] = ()) -> SidecarSpec:
        """The spec of the VAE's own sidecar on this host, which works while this one does."""
        place = self.slot.vae.directory.parent
        return replace(
            self, ranks=ranks, gpus=gpus, directory=place, nnodes=1, node_rank=0, rdzv_endpoint="", address="unix"
        )


def usual_spec() -> SidecarSpec:
    """Where nothing else is asked for: a sidecar of this machine, or the one elsewhere that the environment names."""
    address = os.environ.get(REMOTE_VARIABLE)
    return SidecarSpec(remote=True, address=address, token_file=usual_token_file()) if address else SidecarSpec()


def usual_token_file() -> Path | None:
    """That of a sidecar elsewhere, if the environment names one."""
    name = os.environ.get(TOKEN_VARIABLE)
    return Path(name).expanduser() if name else None


def device_and_ranks(spec: SidecarSpec) -> tuple[devices.Device, int]:
    """Where the ranks run, and how many they are over all hosts. Raises `UserError` for GPUs that are not there."""
    count = 0 if spec.device == "cpu" else devices.gpu_count(spec.python)
    if spec.gpus:
        devices.check_gpus(spec.gpus, spec.ranks // spec.nnodes, spec.device, count)
    return devices.choose(spec.device, spec.ranks, spec.nnodes, len(spec.gpus) or count)


@functools.lru_cache(maxsize=16)
def settings_of(spec: SidecarSpec) -> records.Settings:
    check(spec)
    device, ranks = device_and_ranks(spec)
    check_cores(device, ranks // spec.nnodes, resources.cores())
    shape = {
        "device": device,
        "address": spec.address,
        "ranks": ranks,
        "nnodes": spec.nnodes,
        "node_rank": spec.node_rank,
        "compute_timeout": spec.compute_timeout or COMPUTE_TIMEOUT_S[device],
        "hang_timeout": spec.hang_timeout,
        "idle_timeout": spec.idle_timeout,
        "grace": spec.grace,
        "max_body": spec.max_body,
        "log_bytes": spec.log_bytes,
        "worker": spec.worker,
        "store": spec.rdzv_endpoint,
        "gpus": spec.gpus,
    }
    surroundings = [
        spec.python,
        os.environ.get("CUDA_VISIBLE_DEVICES"),
        str(spec.token_file),
        _code_version(),
    ]
    key = hashlib.sha256(json.dumps([shape, surroundings], sort_keys=True).encode()).hexdigest()[:16]
    return records.Settings.model_validate({**shape, "key": key})


def check(spec: SidecarSpec) -> None:
    """Raise `UserError` for a spec that contradicts itself."""
    if spec.remote and spec.address == "unix":
        raise UserError("A sidecar elsewhere needs an address.", "Give it as tcp://host:port.")
    if spec.remote and spec.gpus:
        raise UserError(
            f"devices={','.join(map(str, spec.gpus))} cannot be chosen for the sidecar at {spec.address}.",
            "Leave devices empty, and name them where that sidecar is started: python cli start --devices.",
        )
    if spec.nnodes > 1 and not spec.rdzv_endpoint:
        raise UserError(f"{spec.nnodes} hosts need a place to meet.", "Give --rdzv-endpoint host:port of host 0.")
    if not 0 <= spec.node_rank < spec.nnodes:
        raise UserError(f"node rank {spec.node_rank} does not lie in 0..{spec.nnodes - 1}.")
    if spec.rdzv_endpoint and not re.fullmatch(r".+:\d+", spec.rdzv_endpoint):
        raise UserError(f"{spec.rdzv_endpoint!r} is not of the form host:port.")
    if spec.nnodes == 1 and spec.rdzv_endpoint:
        raise UserError(
            f"--rdzv-endpoint {spec.rdzv_endpoint} is where several hosts meet, but this sidecar has one.",
            "Leave it out, or give --nnodes.",
        )
    if spec.address != "unix":
        try:
            addresses.split(spec.address)
        except ValueError as error:
            raise UserError(f"{error}.", 'Use "unix" or tcp://host:port.') from error


def _code_version() -> list[object]:
    """The ranks' code: a sidecar that runs an older one is not adopted."""
    files = sorted((devices.PACK / "parallel_backend").rglob("*.py"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
