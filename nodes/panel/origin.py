"""Who may ask the panel's routes: pages of this server, under a name of its own.

A page of another site may not. Nor may one whose name its owner has pointed at this machine (DNS rebinding): such a
page's requests look like those of the server's own, but for the name in `Host`.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Collection, Mapping
from urllib.parse import SplitResult, urlsplit

from ...parallel_backend.errors import UserError

ALLOWED_VARIABLE = "PARALLELDIT_ALLOWED_HOSTS"
OWN_SITES = ("same-origin", "none")


def own_names(listen: str) -> frozenset[str]:
    """Names of this server: the machine's, those at which ComfyUI listens (`--listen`), those that the user allows."""
    machine = socket.gethostname()
    named = [machine, f"{machine}.local", *listen.split(","), *os.environ.get(ALLOWED_VARIABLE, "").split(",")]
    return frozenset(_plain(name) for name in named if name.strip())


def check(headers: Mapping[str, str], names: Collection[str]) -> None:
    """Raise `UserError` for a request that is not from a page of this server. `names`: its own."""
    host, forwarded = _host_of(headers, "Host"), _host_of(headers, "X-Forwarded-Host")
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
    page = _split(origin or headers.get("Referer", ""))
    # Over https nobody answers to a name that is not his: his certificate does not fit.
    is_certified = page.scheme == "https" and any(_is_same(page, each) for each in (host, forwarded))
    if not _is_own(host, names) and not is_certified:
        raise UserError(
            f"{host.hostname or 'A host without name'} is no name of this server.",
            f"If it is yours, name it in the environment of ComfyUI: {ALLOWED_VARIABLE}={host.hostname or '…'}.",
        )
    pages = [host, *([forwarded] if _is_own(forwarded, names) or is_certified else [])]
    if site not in OWN_SITES if site else origin and not any(_is_same(page, each) for each in pages):
        raise UserError(f"A page of {origin or 'another site'} may not do this.")


def _is_own(host: SplitResult, names: Collection[str]) -> bool:
    """Whether nobody else can have chosen that name: an address, a name without a domain, or a known one."""
    name = _plain(host.hostname or "")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return bool(name) and ("." not in name or name.endswith(".localhost") or name in names)
    return True


def _is_same(page: SplitResult, host: SplitResult) -> bool:
    """Whether the page is of that host; of the ports, where both have one."""
    try:
        ports = {port for port in (page.port, host.port) if port is not None}
    except ValueError:
        return False
    return bool(page.hostname) and _plain(page.hostname) == _plain(host.hostname or "") and len(ports) < 2


def _host_of(headers: Mapping[str, str], name: str) -> SplitResult:
    """The host in a header; of several, through which a request has come, the first."""
    return _split(f"//{headers.get(name, '').partition(',')[0].strip()}")


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def _plain(name: str) -> str:
    return name.strip().strip("[]").rstrip(".").lower()
