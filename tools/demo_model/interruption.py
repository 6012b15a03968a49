"""Ending a long run in good order."""

from __future__ import annotations

import signal


class Interruption:
    """True once SIGTERM or SIGINT has come; the run then saves and ends by itself."""

    def __init__(self) -> None:
        self._came = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def __bool__(self) -> bool:
        return self._came

    def _note(self, *_: object) -> None:
        self._came = True
