"""Every rank beats, rank 0 listens. Beats and the failures of single ranks pass through torchrun's TCP store, which
lives outside of the ranks and works while collectives are stuck."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from datetime import timedelta
from typing import NoReturn

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import Store

from ..failures import Outcome

log = logging.getLogger(__name__)

BEAT_S = 0.5


def connect_store(host: str = "", port: int = 0) -> TCPStore:
    """A connection of its own to the store of torchrun's agent: one per thread, since a call may block."""
    return TCPStore(
        host or os.environ["MASTER_ADDR"],
        port or int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
    )


def report_failure(store: Store, sequence: int, rank: int, outcome: Outcome) -> None:
    """Say that `rank` left request number `sequence` with an error; the first to say it is heard."""
    store.compare_set(f"failed/{sequence}", "", json.dumps({"rank": rank, **outcome.to_json()}))


class Pulse(threading.Thread):
    """Beats for this rank. On other ranks than 0 it also ends the process when rank 0 falls silent."""

    def __init__(self, rank: int, silence_limit: float) -> None:
        super().__init__(name="pulse", daemon=True)
        self._rank = rank
        self._silence_limit = silence_limit
        self._store = connect_store()
        self._beats = Beats(self._store, [0])

    def run(self) -> None:
        count = 0
        while True:
            count += 1
            try:
                self._store.set(f"beat/{self._rank}", str(count))
                silence, _ = self._beats.quietest()
            except RuntimeError as error:
                self._leave(f"The store of torchrun is gone: {error}")
            if self._rank != 0 and silence > self._silence_limit:
                self._leave(f"Rank 0 has been silent for {silence:.0f} s.")
            time.sleep(BEAT_S)

    def _leave(self, reason: str) -> NoReturn:
        log.error(reason)
        os._exit(1)


class Beats:
    """The beats of `ranks`, timed by the listener's own clock."""

    def __init__(self, store: Store, ranks: list[int]) -> None:
        self._store = store
        self._ranks = ranks
        self._heard = {rank: (b"", time.monotonic()) for rank in ranks}

    def quietest(self) -> tuple[float, int]:
        """Seconds since the last beat of the quietest rank, and that rank."""
        now = time.monotonic()
        for rank in self._ranks:
            key = f"beat/{rank}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            if beat != self._heard[rank][0]:
                self._heard[rank] = (beat, now)
        return max((now - at, rank) for rank, (_, at) in self._heard.items())
