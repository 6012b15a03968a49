"""What is wrong with the bytes of the other side."""

from __future__ import annotations


class ProtocolError(Exception):
    """A frame, a message or a handshake that the protocol does not allow. `fatal`: the stream is out of step."""

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal
