"""What is wrong with the bytes of the other side."""

from __future__ import annotations


class ProtocolError(Exception):
    """A frame, a message or a handshake that the protocol does not allow."""
