"""Start, adopt and stop the sidecar: one torchrun per life."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from ..parallel_backend.errors import UserError
from ..parallel_backend.protocol import messages, records
from ..parallel_backend.protocol.errors import ProtocolError
from .client import Client, SidecarError
from .instance import SidecarInstance
from .runtime_dir import Slot
from .spawn import Say, launch, read_token
from .spec import SidecarSpec, check, settings_of

SHUTDOWN_S = 15.0

_clients: dict[SidecarSpec, Client] = {}
_clients_lock = threading.Lock()


def ensure_sidecar(spec: SidecarSpec, on_progress: Say = lambda text: None, *, owned: bool = True) -> Client:
    """A client of a ready sidecar as `spec` wants it: the running one if it is the same, else a new one.

    With `owned` the sidecar ends `spec.grace` seconds after this process. Raises `UserError` or `SidecarError`.
    """
    with _clients_lock:
        client = _clients.get(spec)
        if client is None or not client.alive:
            client = _connect_remote(spec) if spec.remote else _connect(start(spec, on_progress, owned=owned), spec)
            _clients[spec] = client
        return client


def start(spec: SidecarSpec, on_progress: Say = lambda text: None, *, owned: bool = True) -> SidecarInstance:
    """Start this host's part of a sidecar, or adopt the running one, and wait until all ranks have met."""
    settings = settings_of(spec)
    slot = spec.slot
    owner = records.this_process() if owned else None
    with slot.lock(spec.start_timeout, on_progress):
        life = current(slot)
        if life is not None and life.is_alive and _is_adopted(life, settings, owner):
            return life
        if life is not None:
            _replace(life, settings, on_progress)
        return launch(slot, spec, settings, owner, on_progress)


def inherit(slot: Slot) -> bool:
    """Own the sidecar of a process that has ended, so that it is still there for the first request, which adopts it or
    ends it if another one is wanted. False when there is none.
    """
    life = current(slot)
    owner = life.owner if life else None
    if life is None or owner is None or owner.alive or not (life.is_alive and life.is_ready) or life.end is not None:
        return False
    life.own(records.this_process())
    return True


def stop(slot: Slot, on_progress: Say = lambda text: None) -> bool:
    """End the sidecar of `slot`; False when there was none. Nothing of it is left when this returns."""
    with slot.lock(SHUTDOWN_S, on_progress):
        life = current(slot)
        was_alive = life is not None and life.is_alive
        if life is not None:
            _end(life, on_progress)
        return was_alive


def current(slot: Slot) -> SidecarInstance | None:
    return SidecarInstance(slot.life) if slot.life else None


def connect(life: SidecarInstance) -> Client:
    """A new connection to the sidecar of `life`. Raises `OSError` or `ProtocolError`."""
    settings = life.settings
    if settings is None:
        raise ProtocolError(f"The sidecar in {life.path} belongs to another version of the pack.")
    token = "" if settings.address == "unix" else (life.path / records.TokenFile).read_text().strip()
    return Client.connect(
        settings.address,
        life.path / records.SocketFile,
        token=token,
        life=life,
        hang_timeout=settings.hang_timeout,
        max_body=settings.max_body,
    )


def visit(spec: SidecarSpec) -> Client | None:
    """A connection of one's own to the sidecar that runs: no other request is waited for, and nothing is ended with it.

    None when there is no sidecar. Raises `OSError`, `ProtocolError` or `UserError` when it takes no connection.
    """
    if spec.remote:
        return _connect_remote(spec)
    life = current(spec.slot)
    if life is None or not life.is_alive or not life.is_ready:
        return None
    client = connect(life)
    client.life = None
    return client


# -- adopt -------------------------------------------------------------------------------------------------------


def _is_adopted(life: SidecarInstance, settings: records.Settings, owner: records.Process | None) -> bool:
    """Whether the running sidecar is the one that is wanted, and now has the new owner."""
    if life.settings is None or life.settings.key != settings.key or not life.is_ready or life.end is not None:
        return False
    if owner is None or life.owner is not None:
        life.own(owner)
    return True


def _replace(life: SidecarInstance, settings: records.Settings, on_progress: Say) -> None:
    """End a sidecar that is not the wanted one, unless another living process uses it."""
    owner = life.owner
    if life.is_alive and owner and owner.alive and owner.pid != os.getpid() and life.settings:
        raise UserError(
            f"A sidecar of {life.settings.ranks} ranks on {life.settings.device} belongs to process {owner.pid}; "
            f"this one asks for {settings.ranks} ranks on {settings.device}.",
            "Ask for the same, stop it with `python cli stop`, or set PARALLELDIT_RUNTIME_DIR to another directory.",
        )
    if life.is_alive:
        on_progress("ending the sidecar that is running: another one is wanted")
    _end(life, on_progress)


def _end(life: SidecarInstance, on_progress: Say) -> None:
    if life.is_alive and life.is_ready and life.settings and life.settings.node_rank == 0:
        try:
            client = connect(life)
            client.life = None
            client.request(messages.Shutdown(id=0), timeout=SHUTDOWN_S)
        except (OSError, ProtocolError, SidecarError, UserError) as error:
            on_progress(f"the sidecar does not leave by itself ({error}): killing it")
            life.kill()
    life.kill(patience=SHUTDOWN_S if life.end else 0.0)


# -- connect -----------------------------------------------------------------------------------------------------


def _connect(life: SidecarInstance, spec: SidecarSpec) -> Client:
    if spec.node_rank:
        raise UserError(
            "Only host 0 of a sidecar of several hosts takes requests.", "Connect on the host of node rank 0."
        )
    try:
        return connect(life)
    except (OSError, ProtocolError) as error:
        raise SidecarError(f"The sidecar takes no connection: {error}", f"The logs are in {life.path}.") from error


def _connect_remote(spec: SidecarSpec) -> Client:
    check(spec)
    token = read_token(spec.token_file) if spec.token_file else ""
    try:
        return Client.connect(spec.address, Path(), token=token, hang_timeout=spec.hang_timeout, max_body=spec.max_body)
    except OSError as error:
        raise UserError(
            f"No sidecar answers at {spec.address}: {error}.", "Start it there, or mend the address."
        ) from error
    except ProtocolError as error:
        raise UserError(f"The sidecar at {spec.address} refuses: {error}") from error
