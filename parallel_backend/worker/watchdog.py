"""Rank 0's watchdog: ends the sidecar when a rank fails alone or falls silent, and when no client needs it."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from pathlib import Path

from ..failures import Outcome
from ..protocol import messages, records
from .board import Board
from .heartbeat import Beats
from .server import Job, Server

log = logging.getLogger(__name__)

TICK_S = 0.2
HEARTBEAT_S = 1.0
AGREEMENT_S = 2.0
"""After a crash on CUDA: enough for torchrun to notice the rank that died first."""
FAREWELL_S = 10.0


class Watch(threading.Thread):
    def __init__(self, server: Server, settings: records.Settings, life: Path, board: Board) -> None:
        super().__init__(name="watch", daemon=True)
        self._server = server
        self._settings = settings
        self._life = life
        self._board = board
        self._beats = Beats(board, list(range(settings.ranks)))
        self._alone_since = time.monotonic()
        self._failed_since: tuple[int, float] | None = None
        self._log_trouble_reported = False
        self._cancel_told: int | None = None
        self.sequence: int | None = None
        """Number of the request under way; the main thread sets it."""

    def run(self) -> None:
        next_heartbeat = 0.0
        while True:
            try:
                self._look_for_failure()
                self._look_for_cancel()
                if time.monotonic() >= next_heartbeat:
                    next_heartbeat = time.monotonic() + HEARTBEAT_S
                    self._heartbeat()
                    self._look_for_log_trouble()
                    self._look_for_need()
            except OSError:
                log.exception("the sidecar's directory cannot be read")
            except RuntimeError as error:
                self.crash(Outcome("crash", f"The store of torchrun is gone: {error}"), rank=0)
            time.sleep(TICK_S)

    # -- ranks -----------------------------------------------------------------------------------------------

    def _look_for_failure(self) -> None:
        """The other ranks have time to arrive at a user's error too, or to notice that a rank gave up their groups.

        A crash on CUDA ends the sidecar in any case, and so does a rank that stands still.
        """
        sequence = self.sequence
        failed = None if sequence is None else self._board.failure(sequence)
        if sequence is None or failed is None:
            return
        if self._failed_since is None or self._failed_since[0] != sequence:
            self._failed_since = sequence, time.monotonic()
        outcome = Outcome("crash" if failed.kind == "stalled" else failed.kind, failed.message, failed.hint)
        ends = outcome.is_broken and self._settings.device == "cuda"
        patience = 0.0 if failed.kind == "stalled" else AGREEMENT_S if ends else self._settings.hang_timeout
        if time.monotonic() - self._failed_since[1] > patience and self.sequence == sequence:
            self.crash(outcome, failed.rank)

    def _look_for_cancel(self) -> None:
        """Tells the ranks that the client has cancelled what is under way: they may be far from asking each other."""
        sequence, running = self.sequence, self._server.running
        if sequence is not None and running is not None and running.cancelled and self._cancel_told != sequence:
            self._cancel_told = sequence
            self._board.tell_cancel(sequence)

    def _heartbeat(self) -> None:
        silence, rank = self._beats.quietest()
        self._server.broadcast(messages.Heartbeat(oldest_beat_s=silence, quietest_rank=rank))
        if silence > self._settings.hang_timeout:
            text = (
                f"Rank {rank} hangs: it has not answered for {silence:.0f} s (limit {self._settings.hang_timeout:g} s)."
            )
            self.crash(Outcome("crash", text), rank)

    def crash(self, outcome: Outcome, rank: int) -> None:
        """Reports the failure to client and launcher, then ends this process, and thereby the sidecar."""
        log.error("the sidecar ends: %s", outcome.message)
        end = records.End(clean=False, message=outcome.message, hint=outcome.hint, rank=rank)
        records.write_first(self._life / records.EndFile, end)
        running = self._server.running
        if running is not None:
            code = "user" if outcome.kind == "user" else "crash"
            failure = messages.Failure(
                id=running.request.id, code=code, message=outcome.message, hint=outcome.hint, rank=rank
            )
            running.send(failure)
        self._server.close()
        sys.stderr.flush()
        os._exit(1)

    # -- clients ---------------------------------------------------------------------------------------------

    def _look_for_log_trouble(self) -> None:
        """The pump of the logs says when the disk is full; the next client with a request hears it, once."""
        running = self._server.running
        lost = None if self._log_trouble_reported or running is None else self._board.lost_log()
        if running is None or lost is None:
            return
        self._log_trouble_reported = True
        running.send(messages.Log(id=running.request.id, level="warning", text=str(lost)))

    def _look_for_need(self) -> None:
        now = time.monotonic()
        owner = records.read(self._life / records.OwnerFile, records.Process)
        if self._server.clients or owner is None or owner.alive:
            self._alone_since = now
        if not self._server.is_idle:
            return
        idle = now - self._server.last_work
        if not (self._life / records.SettingsFile).exists():
            self._farewell("Its directory was removed: nobody can find the sidecar any more.")
        elif now - self._alone_since > self._settings.grace:
            self._farewell(f"The process that owned the sidecar has been gone for {self._settings.grace:g} s.")
        elif 0 < self._settings.idle_timeout < idle:
            self._farewell(f"No request for {self._settings.idle_timeout:g} s.")

    def _farewell(self, reason: str) -> None:
        log.info("the sidecar ends: %s", reason)
        records.write_first(self._life / records.EndFile, records.End(clean=True, message=reason))
        self._server.submit(Job(messages.Shutdown(id=0)))
        time.sleep(FAREWELL_S)
        self.crash(Outcome("crash", "The ranks did not leave when they were asked to."), rank=0)
