"""How the ranks of a sidecar find each other.

On one host they meet in files of the sidecar's own directory, so that no port is open for it: torchrun's own rendezvous
would listen on all interfaces, without any authentication. Between hosts they meet in that one.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from torch.distributed import FileStore, HashStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import Store
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from ..protocol import records
from .board import Board, FileBoard, StoreBoard

ONE_HOST = "one-host"
"""The name of `OneHost` on torchrun's command line; launcher/spawn.py gives it."""
PATIENCE = timedelta(seconds=60)


class OneHost(RendezvousHandler):
    """For a torchrun that is alone: there is nobody to meet."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run = parameters.run_id

    def get_backend(self) -> str:
        return ONE_HOST

    def next_rendezvous(self) -> RendezvousInfo:
        nowhere = RendezvousStoreInfo(master_addr="127.0.0.1", master_port=0)
        return RendezvousInfo(HashStore(), rank=0, world_size=1, bootstrap_store_info=nowhere)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nobody else would hear it."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run

    def shutdown(self) -> bool:
        return True


def register() -> None:
    """Have torchrun know `OneHost` by its name."""
    rendezvous_handler_registry.register(ONE_HOST, OneHost)


def connect_store(settings: records.Settings, life: Path) -> Store:
    """A connection of its own to the store in which the ranks' groups are formed."""
    if settings.nnodes == 1:
        return FileStore(os.fsencode(life / records.GroupsFile))  # pyright: ignore[reportArgumentType]
    host, _, port = settings.store.rpartition(":")
    return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=PATIENCE)


def connect_board(settings: records.Settings, life: Path) -> Board:
    """The ranks' board. Between hosts that is a connection of its own: one per thread, since a call may block."""
    if settings.nnodes == 1:
        return FileBoard(life, settings.ranks)
    return StoreBoard(connect_store(settings, life))
