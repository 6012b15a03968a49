"""Every rank beats, rank 0 listens."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import NoReturn

from ..machine.clock import RunningClock
from .board import Board, Failed
from .stall import Stall

log = logging.getLogger(__name__)

BEAT_S = 0.5


class Pulse(threading.Thread):
    """Beats for this rank. On other ranks than 0 it also ends the process when rank 0 falls silent.

    `sequence`: number of the request under way, which the main thread sets. Rank 0 hears when that thread waits for a
    file for longer than `stall_limit` seconds.
    """

    def __init__(self, board: Board, rank: int, stall_limit: float, silence_limit: float) -> None:
        super().__init__(name="pulse", daemon=True)
        self.sequence: int | None = None
        self._cancelled: int | None = None
        self._stall = Stall(stall_limit)
        self._rank = rank
        self._silence_limit = silence_limit
        self._board = board
        self._beats = Beats(board, [0])

    def run(self) -> None:
        count = 0
        while True:
            count += 1
            try:
                self._board.beat(self._rank, count)
                silence, _ = self._beats.quietest()
                self._look_at_request()
            except (RuntimeError, OSError) as error:
                self._leave(f"The other ranks cannot hear this one: {error}")
            if self._rank != 0 and silence > self._silence_limit:
                self._leave(f"Rank 0 has been silent for {silence:.0f} s.")
            time.sleep(BEAT_S)

    @property
    def is_cancelled(self) -> bool:
        """Whether the client has cancelled the request that is under way."""
        return self._cancelled is not None and self._cancelled == self.sequence

    def _look_at_request(self) -> None:
        where, sequence = self._stall.look(), self.sequence
        if sequence is None:
            return
        self._cancelled = self._board.cancelled()
        if where:
            text, hint = f"Rank {self._rank} hangs: {where}.", "Is a model on a network drive that is gone?"
            self._board.tell_failure(sequence, Failed(rank=self._rank, kind="stalled", message=text, hint=hint))

    def _leave(self, reason: str) -> NoReturn:
        log.error(reason)
        os._exit(1)


class Beats:
    """The beats of `ranks`, timed by the listener's own clock, which stands still while it is suspended."""

    def __init__(self, board: Board, ranks: list[int]) -> None:
        self._board = board
        self._ranks = ranks
        self._clock = RunningClock()
        self._heard = {rank: (0, self._clock.now()) for rank in ranks}

    def quietest(self) -> tuple[float, int]:
        """Seconds since the last beat of the quietest rank, and that rank."""
        now = self._clock.now()
        for rank in self._ranks:
            beat = self._board.beat_of(rank)
            if beat != self._heard[rank][0]:
                self._heard[rank] = (beat, now)
        return max((now - at, rank) for rank, (_, at) in self._heard.items())
