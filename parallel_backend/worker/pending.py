"""Connections that have yet to prove that they know the token."""

from __future__ import annotations

import contextlib
import socket
import threading

MAX_PENDING = 64
MAX_PER_ADDRESS = 16


class PendingConnections:
    """They are bounded, of one address and of all. Beyond that the oldest goes: an honest handshake takes milliseconds,
    so that one who holds places and says nothing displaces nobody but himself."""

    def __init__(self, total: int = MAX_PENDING, per_address: int = MAX_PER_ADDRESS) -> None:
        self._total = total
        self._per_address = per_address
        self._lock = threading.Lock()
        self._addresses: dict[socket.socket, str] = {}
        """In the order of their arrival."""

    def enter(self, sock: socket.socket, address: str) -> None:
        """`address`: the host that it comes from; "" on a Unix socket, which only its owner reaches."""
        with self._lock:
            neighbours = [other for other, its in self._addresses.items() if address and its == address]
            if len(neighbours) >= self._per_address:
                self._send_away(neighbours[0])
            elif len(self._addresses) >= self._total:
                self._send_away(next(iter(self._addresses)))
            self._addresses[sock] = address

    def leave(self, sock: socket.socket) -> None:
        """It is known now, or gone."""
        with self._lock:
            self._addresses.pop(sock, None)

    def _send_away(self, sock: socket.socket) -> None:
        """The thread that serves it wakes, and closes it."""
        del self._addresses[sock]
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
