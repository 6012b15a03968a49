"""What a sidecar needs of this host, looked at before it starts: each lack is told in one sentence, with its cause."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

from ..parallel_backend.errors import UserError
from ..parallel_backend.machine import resources
from ..parallel_backend.protocol import records
from .runtime_dir import ELSEWHERE

RANKS_PER_CORE, LEAST_RANKS = 4, 8
"""On CPUs, ranks are for trying layouts out: 8 fit any machine, 16 one of four cores. Each takes seconds of a core to
import torch, all at the same time: 64 on two cores were not up after 180 s."""
RANK_BYTES = 400_000_000
"""Of a rank without a model."""
OPEN_FILES = 64
FREE_DISK_BYTES = 1 << 20
LOOPBACK = "127.0.0.1"


def check_cores(device: str, local_ranks: int, cores: int) -> None:
    """Raises `UserError` for more CPU ranks than can come to anything on so many cores."""
    most = max(LEAST_RANKS, RANKS_PER_CORE * cores)
    if device == "cpu" and local_ranks > most:
        raise UserError(
            f"{local_ranks} ranks on this host are too many for {cores} {'core' if cores == 1 else 'cores'}.",
            f"Use at most {most} ranks; as many as there are cores, or fewer, are fast.",
        )


def check_host(settings: records.Settings, directory: Path) -> None:
    """Raises `UserError` naming what this host lacks for these ranks. `directory`: the sidecar's own."""
    _check_memory(len(settings.local_ranks), resources.memory().available)
    _check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    _check_disk(directory)
    _check_special_files(directory)
    if settings.nnodes == 1:
        _check_loopback()


def _check_memory(local_ranks: int, free: int) -> None:
    if local_ranks * RANK_BYTES > free:
        fit = free // RANK_BYTES
        raise UserError(
            f"{local_ranks} ranks need about {local_ranks * RANK_BYTES / 1e9:.1f} GB before they load anything, but "
            f"{free / 1e9:.1f} GB of memory are free on this host.",
            f"Use {fit} {'rank' if fit == 1 else 'ranks'}, or free memory." if fit else "Free memory.",
        )


def _check_open_files(most: int) -> None:
    if 0 <= most < OPEN_FILES:
        raise UserError(
            f"A process may have {most} open files here, but a rank needs at least {OPEN_FILES}.",
            "Raise the limit: ulimit -n 1024.",
        )


def _check_disk(directory: Path) -> None:
    disk = os.statvfs(directory)
    free = disk.f_bavail * disk.f_frsize
    if free < FREE_DISK_BYTES:
        raise UserError(f"The disk of {directory} is full: {free / 1e3:.0f} kB are free.", ELSEWHERE)


def _check_special_files(directory: Path) -> None:
    """Logs pass through named pipes."""
    probe = directory / "probe"
    try:
        os.mkfifo(probe, 0o600)
        probe.unlink()
    except OSError as error:
        raise UserError(f"The file system of {directory} has no named pipes: {error.strerror}.", ELSEWHERE) from error


def _check_loopback() -> None:
    try:
        with socket.create_server((LOOPBACK, 0)) as server, socket.create_connection(server.getsockname()[:2], 2.0):
            return
    except OSError as error:
        raise UserError(
            f"This host cannot connect to itself at {LOOPBACK}: {error.strerror or error}.",
            "The ranks meet there. Bring the loopback device up: ip link set lo up.",
        ) from error
