"""Start, adopt and stop the sidecar: one torchrun per life."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from ..parallel_backend.errors import UserError
from ..parallel_backend.protocol import messages, records
from ..parallel_backend.protocol.errors import ProtocolError
from .client import Client, NotBegun, SidecarError
from .instance import SidecarInstance
from .runtime_dir import Slot
from .spawn import Say, launch, read_token
from .spec import SidecarSpec, check, settings_of

SHUTDOWN_S = 15.0
DYING_S = 1.0

_clients: dict[SidecarSpec, Client] = {}
_clients_lock = threading.Lock()


def ensure_sidecar(spec: SidecarSpec, on_progress: Say = lambda text: None, *, owned: bool = True) -> Client:
    """A client of a ready sidecar as `spec` wants it: the running one if it is the same, else a new one.

    With `owned` the sidecar ends `spec.grace` seconds after this process. Raises `UserError` or `SidecarError`.
    """
    with _clients_lock:
        client = _clients.get(spec)
        if client is None or not client.alive:
            client = _connect_remote(spec) if spec.remote else _connect(spec, on_progress, owned=owned)
            _clients[spec] = client
        return client


def spec_of(client: Client) -> SidecarSpec | None:
    """What `ensure_sidecar` gave `client` for. None for other clients."""
    return next((spec for spec, each in list(_clients.items()) if each is client), None)


def start(spec: SidecarSpec, on_progress: Say = lambda text: None, *, owned: bool = True) -> SidecarInstance:
    """Start this host's part of a sidecar, or adopt the running one, and wait until all ranks have met."""
    settings = settings_of(spec)
    slot = spec.slot
    owner = records.this_process() if owned else None
    with slot.lock(spec.start_timeout, on_progress):
        life = current(slot)
        if life is not None and _is_adopted(life, settings, owner):
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
    if life is None or owner is None or owner.alive or not (life.is_whole and life.is_ready) or life.end is not None:
        return False
    life.own(records.this_process())
    return True


def stop(slot: Slot, on_progress: Say = lambda text: None, *, force: bool = False) -> bool:
    """End the sidecar of `slot`; False when there was none. Nothing of it is left when this returns.

    Raises `UserError` while a request of another client is under way, unless `force`.
    """
    with slot.lock(SHUTDOWN_S, on_progress):
        life = current(slot)
        was_alive = life is not None and life.is_alive
        if life is not None:
            if force:
                _leave_own(life)
            _end(life, on_progress, force=force)
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
    if life is None or not life.is_whole or not life.is_ready:
        return None
    client = connect(life)
    client.life = None
    return client


# -- adopt -------------------------------------------------------------------------------------------------------


def _is_adopted(life: SidecarInstance, settings: records.Settings, owner: records.Process | None) -> bool:
    """Whether the running sidecar is the one that is wanted, and now has the new owner."""
    if (
        not life.is_whole
        or life.settings is None
        or life.settings.key != settings.key
        or not life.is_ready
        or life.end is not None
    ):
        return False
    if owner is None or life.owner is not None:
        life.own(owner)
    return True


def _replace(life: SidecarInstance, settings: records.Settings, on_progress: Say) -> None:
    """End a sidecar that is not the wanted one, unless another living process owns it, or it is at work for one."""
    owner, found = life.owner, life.settings
    if life.is_alive and owner and owner.alive and owner.pid != os.getpid() and found:
        raise _taken(f"belongs to process {owner.pid}", found, settings)
    if life.is_alive:
        on_progress("ending the sidecar that is running: another one is wanted")
    try:
        _end(life, on_progress)
    except UserError as error:
        raise (_taken("is at work for another client", found, settings) if found else error) from error


def _taken(why: str, found: records.Settings, wanted: records.Settings) -> UserError:
    alike = (found.ranks, found.device) == (wanted.ranks, wanted.device)
    asked = "other settings" if alike else f"{wanted.ranks} ranks on {wanted.device}"
    return UserError(
        f"A sidecar of {found.ranks} ranks on {found.device} {why}; this one asks for {asked}.",
        "Ask for the same, wait, stop it with `python cli stop` (`--force` while it works), or set "
        "PARALLELDIT_RUNTIME_DIR to another directory.",
    )


def _leave_own(life: SidecarInstance) -> None:
    """This process cancels what it has under way itself, rather than to hear that it was stopped."""
    # Without the lock: whoever starts a sidecar holds it, and waits for us.
    for client in list(_clients.values()):
        if client.life is not None and client.life.path == life.path:
            client.leave(SHUTDOWN_S)


def _me() -> str:
    """This process, for those whose sidecar it ends."""
    program = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])[:100]
    return f"process {os.getpid()} ({program})"


def _end(life: SidecarInstance, on_progress: Say, *, force: bool = False) -> None:
    """Raises `UserError` while a request of another client is under way, unless `force`."""
    if life.is_whole and life.is_ready and life.settings and life.settings.node_rank == 0:
        try:
            client = connect(life)
            client.life = None
            client.request(messages.Shutdown(id=0, by=_me(), force=force), timeout=SHUTDOWN_S)
        except (OSError, ProtocolError, SidecarError) as error:
            on_progress(f"the sidecar does not leave by itself ({error}): killing it")
            stopped = records.End(clean=True, message=f"The sidecar was stopped by {_me()}.")
            records.write_first(life.path / records.EndFile, stopped)
            life.kill()
    life.kill(patience=SHUTDOWN_S if life.end else 0.0)


# -- connect -----------------------------------------------------------------------------------------------------


def _connect(spec: SidecarSpec, on_progress: Say, *, owned: bool) -> Client:
    """To the sidecar that runs or is started; once more where a process of it dies before it takes the connection."""
    try:
        return _connect_once(spec, on_progress, owned=owned)
    except NotBegun as error:
        on_progress(f"{error.message} Another one is started.")
        return _connect_once(spec, on_progress, owned=owned)


def _connect_once(spec: SidecarSpec, on_progress: Say, *, owned: bool) -> Client:
    life = start(spec, on_progress, owned=owned)
    if spec.node_rank:
        raise UserError(
            "Only host 0 of a sidecar of several hosts takes requests.", "Connect on the host of node rank 0."
        )
    try:
        return connect(life)
    except (OSError, ProtocolError) as error:
        if not _has_lost_a_rank(life):
            raise SidecarError(f"The sidecar takes no connection: {error}", f"The logs are in {life.path}.") from error
        message, hint = life.why()
        life.kill()
        raise NotBegun(message, hint) from error


def _has_lost_a_rank(life: SidecarInstance) -> bool:
    """Whether a rank is dead, or dies within a moment: it hangs up before its process is gone."""
    deadline = time.monotonic() + DYING_S
    while life.is_whole and time.monotonic() < deadline:
        time.sleep(0.02)
    return not life.is_whole


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
