"""Time that passes for this process only while it runs."""

from __future__ import annotations

import time

MOST_S = 2.0
"""The longest time between two questions that a process on a loaded machine may have been waiting to run."""


class RunningClock:
    """Seconds in which this process could run, for limits on the silence of others: a whole container, or a machine,
    that was suspended must not find all of its peers silent when it goes on.

    It counts at most `MOST_S` from one question to the next, so it must be asked more often than that.
    """

    def __init__(self) -> None:
        self._asked = time.monotonic()
        self._counted = 0.0

    def now(self) -> float:
        asked = time.monotonic()
        self._counted += min(asked - self._asked, MOST_S)
        self._asked = asked
        return self._counted
