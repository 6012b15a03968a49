"""The error for invalid bytes from the other side."""

from __future__ import annotations

from ..errors import SHOWN_MODULE


class ProtocolError(Exception):
    """A frame, a message or a handshake that the protocol does not allow."""

    __module__ = SHOWN_MODULE
