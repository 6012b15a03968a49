"""Where a sidecar listens: "unix" (a socket in its own directory) or "tcp://host:port"."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

MAX_UNIX_PATH = 107
"""Bytes that fit into a Unix socket address."""


def split(address: str) -> tuple[str, int]:
    """Host and port of "tcp://host:port". Raises `ValueError` when it is not one."""
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is not an address of the form tcp://host:port")
    return host.strip("[]"), int(port)


def family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


@contextlib.contextmanager
def unix_path(path: Path) -> Iterator[str]:
    """A name of `path` that fits into a Unix socket address, however deep the path is."""
    if len(os.fsencode(path)) <= MAX_UNIX_PATH:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def connect(address: str, path: Path, timeout: float) -> socket.socket:
    """Connects. Raises `OSError` when no process listens."""
    if address != "unix":
        return socket.create_connection(split(address), timeout)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    try:
        with unix_path(path) as short:
            _connect_unix(sock, short, time.monotonic() + timeout)
    except OSError:
        sock.close()
        raise
    return sock


def _connect_unix(sock: socket.socket, path: str, deadline: float) -> None:
    """A Unix socket with a timeout does not wait while too many others connect: it raises `BlockingIOError`."""
    while True:
        try:
            sock.connect(path)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return
