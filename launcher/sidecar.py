"""Start, adopt and stop the sidecar: one torchrun per life."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..parallel_backend.errors import UserError
from ..parallel_backend.protocol import addresses, frames, messages, records
from ..parallel_backend.protocol.errors import ProtocolError
from . import devices
from .client import Client, SidecarError
from .life import Life
from .runtime_dir import Slot

Say = Callable[[str], None]

COMPUTE_TIMEOUT_S = {"cpu": 1800.0, "cuda": 600.0}
"""How long a rank waits for its peers inside the work: a stage of CPU ranks may compute for long before the next one
hears of it, and CUDA ranks may compile or tune kernels meanwhile."""
SHUTDOWN_S = 15.0
PROGRESS_S = 5.0


@dataclass(frozen=True)
class SidecarSpec:
    """The sidecar that somebody wants. Times in seconds.

    `ranks` counts all hosts; 0 means all GPUs, or two ranks on CPU. `address` is "unix" or "tcp://host:port"; TCP needs
    `token_file`. With `remote` the sidecar at that address is somebody else's to start and stop. Several hosts:
    `nnodes`, this host's `node_rank`, and `rdzv_endpoint` "host:port" of host 0. `compute_timeout` 0 means the device's
    usual one, `idle_timeout` 0 never. `worker` is the module that every rank runs. `gpus`: those that the ranks take,
    by their places among the visible ones; none: the first ones.
    """

    ranks: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    python: str = sys.executable
    address: str = "unix"
    token_file: Path | None = None
    remote: bool = False
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str = ""
    start_timeout: float = 180.0
    compute_timeout: float = 0.0
    hang_timeout: float = 30.0
    idle_timeout: float = 1800.0
    grace: float = 60.0
    max_body: int = frames.MAX_BODY
    log_bytes: int = 16 << 20
    worker: str = "parallel_backend.worker"
    directory: Path | None = None
    gpus: tuple[int, ...] = ()

    @property
    def slot(self) -> Slot:
        return Slot(self.node_rank, self.directory)

    def beside(self, ranks: int, gpus: tuple[int, ...] = ()) -> SidecarSpec:
        """A second sidecar, on this host, that works while this one does."""
        place = self.slot.beside.directory.parent
        return replace(
            self, ranks=ranks, gpus=gpus, directory=place, nnodes=1, node_rank=0, rdzv_endpoint="", address="unix"
        )


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


def start(spec: SidecarSpec, on_progress: Say = lambda text: None, *, owned: bool = True) -> Life:
    """Start this host's part of a sidecar, or adopt the running one, and wait until all ranks have met."""
    settings = _settings(spec)
    slot = spec.slot
    owner = records.this_process() if owned else None
    with slot.lock(spec.start_timeout, on_progress):
        life = current(slot)
        if life is not None and life.is_alive and _is_adopted(life, settings, owner):
            return life
        if life is not None:
            _replace(life, settings, on_progress)
        return _launch(slot, spec, settings, owner, on_progress)


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


def current(slot: Slot) -> Life | None:
    return Life(slot.life) if slot.life else None


def connect(life: Life) -> Client:
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


def _is_adopted(life: Life, settings: records.Settings, owner: records.Process | None) -> bool:
    """Whether the running sidecar is the one that is wanted, and now has the new owner."""
    if life.settings is None or life.settings.key != settings.key or not life.is_ready or life.end is not None:
        return False
    if owner is None or life.owner is not None:
        life.own(owner)
    return True


def _replace(life: Life, settings: records.Settings, on_progress: Say) -> None:
    """End a sidecar that is not the wanted one, unless another living process uses it."""
    owner = life.owner
    if life.is_alive and owner and owner.alive and owner.pid != os.getpid() and life.settings:
        raise UserError(
            f"A sidecar of {life.settings.ranks} ranks on {life.settings.device} belongs to process {owner.pid}; "
            f"this one asks for {settings.ranks} ranks on {settings.device}.",
            "Ask for the same, stop it with `launcher stop`, or set PARALLELDIT_RUNTIME_DIR to another directory.",
        )
    if life.is_alive:
        on_progress("ending the sidecar that is running: another one is wanted")
    _end(life, on_progress)


def _end(life: Life, on_progress: Say) -> None:
    if life.is_alive and life.is_ready and life.settings and life.settings.node_rank == 0:
        try:
            client = connect(life)
            client.life = None
            client.request(messages.Shutdown(id=0), timeout=SHUTDOWN_S)
        except (OSError, ProtocolError, SidecarError, UserError) as error:
            on_progress(f"the sidecar does not leave by itself ({error}): killing it")
            life.kill()
    life.kill(patience=SHUTDOWN_S if life.end else 0.0)


# -- launch ------------------------------------------------------------------------------------------------------


def _launch(
    slot: Slot, spec: SidecarSpec, settings: records.Settings, owner: records.Process | None, on_progress: Say
) -> Life:
    life = Life(slot.new_life())
    endpoint = spec.rdzv_endpoint or f"127.0.0.1:{_free_port()}"
    settings = settings.model_copy(update={"store": endpoint})
    records.write(life.path / records.SettingsFile, settings)
    life.own(owner)
    if settings.address != "unix":
        _write_token(life.path / records.TokenFile, spec.token_file)
    on_progress(f"starting {len(settings.local_ranks)} of {settings.ranks} ranks on {settings.device}")
    agent = _spawn(life, spec, settings)
    records.write(
        life.path / records.AgentFile, records.Process(pid=agent.pid, started=records.started(agent.pid) or 0)
    )
    try:
        _wait_ready(life, agent, settings, spec.start_timeout, on_progress)
    except BaseException:
        life.kill()
        agent.wait()
        raise
    threading.Thread(target=agent.wait, name="torchrun reaper", daemon=True).start()
    return life


def _spawn(life: Life, spec: SidecarSpec, settings: records.Settings) -> subprocess.Popen[bytes]:
    single = settings.nnodes == 1
    command = [
        *(spec.python, "-m", "parallel_backend.worker.torchrun", str(life.path)),
        *(f"--nnodes={settings.nnodes}", f"--node-rank={settings.node_rank}"),
        f"--nproc-per-node={len(settings.local_ranks)}",
        *(
            "--rdzv-backend=static",
            f"--rdzv-endpoint={settings.store}",
            f"--rdzv-conf=timeout={spec.start_timeout:.0f}",
        ),
        *("--max-restarts=0", "--shutdown-timeout=5"),
        *(["--local-addr=127.0.0.1"] if single else []),
        *("-m", settings.worker, str(life.path)),
    ]
    env = devices.rank_environment(
        settings.device, len(settings.local_ranks), single_host=single, base=os.environ, gpus=spec.gpus
    )
    with open(life.path / records.AgentLog, "wb") as log:
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=life.path,
                env=env,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"The sidecar's Python {spec.python} cannot be run: {error.strerror}.") from error


def _wait_ready(
    life: Life, agent: subprocess.Popen[bytes], settings: records.Settings, timeout: float, on_progress: Say
) -> None:
    began, local = time.monotonic(), len(settings.local_ranks)
    said_at, said = began, 0
    while not life.is_ready:
        now, up = time.monotonic(), len(life.ranks)
        if agent.poll() is not None or life.end is not None:
            message, hint = life.why_not_started()
            raise SidecarError(f"The sidecar did not start: {message}", f"{hint} The logs are in {life.path}.".strip())
        if now - began > timeout:
            raise SidecarError(
                f"The sidecar did not start within {timeout:g} s: {up} of the {local} ranks of this host are up.",
                f"The logs are in {life.path}.",
            )
        if up > said or now - said_at > PROGRESS_S:
            said_at, said = now, up
            on_progress(f"{up} of {local} ranks are up after {now - began:.0f} s")
        time.sleep(0.05)
    on_progress(f"the sidecar is ready after {time.monotonic() - began:.1f} s")


def _connect(life: Life, spec: SidecarSpec) -> Client:
    if spec.node_rank:
        raise UserError(
            "Only host 0 of a sidecar of several hosts takes requests.", "Connect on the host of node rank 0."
        )
    try:
        return connect(life)
    except (OSError, ProtocolError) as error:
        raise SidecarError(f"The sidecar takes no connection: {error}", f"The logs are in {life.path}.") from error


def _connect_remote(spec: SidecarSpec) -> Client:
    token = _read_token(spec.token_file) if spec.token_file else ""
    try:
        return Client.connect(spec.address, Path(), token=token, hang_timeout=spec.hang_timeout, max_body=spec.max_body)
    except OSError as error:
        raise UserError(
            f"No sidecar answers at {spec.address}: {error}.", "Start it there, or mend the address."
        ) from error
    except ProtocolError as error:
        raise UserError(f"The sidecar at {spec.address} refuses: {error}") from error


# -- what is wanted ----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _settings(spec: SidecarSpec) -> records.Settings:
    _check(spec)
    gpus = 0 if spec.device == "cpu" else devices.gpu_count(spec.python)
    device, ranks = devices.choose(spec.device, spec.ranks, spec.nnodes, gpus)
    shape = {
        "device": device,
        "address": spec.address,
        "ranks": ranks,
        "nnodes": spec.nnodes,
        "node_rank": spec.node_rank,
        "compute_timeout": spec.compute_timeout or COMPUTE_TIMEOUT_S[device],
        "hang_timeout": spec.hang_timeout,
        "idle_timeout": spec.idle_timeout,
        "grace": spec.grace,
        "max_body": spec.max_body,
        "log_bytes": spec.log_bytes,
        "worker": spec.worker,
        "store": spec.rdzv_endpoint,
    }
    surroundings = [
        spec.python,
        os.environ.get("CUDA_VISIBLE_DEVICES"),
        spec.gpus,
        str(spec.token_file),
        _code_version(),
    ]
    key = hashlib.sha256(json.dumps([shape, surroundings], sort_keys=True).encode()).hexdigest()[:16]
    return records.Settings.model_validate({**shape, "key": key})


def _check(spec: SidecarSpec) -> None:
    if spec.nnodes > 1 and not spec.rdzv_endpoint:
        raise UserError(f"{spec.nnodes} hosts need a place to meet.", "Give --rdzv-endpoint host:port of host 0.")
    if not 0 <= spec.node_rank < spec.nnodes:
        raise UserError(f"node rank {spec.node_rank} does not lie in 0..{spec.nnodes - 1}.")
    if spec.rdzv_endpoint and not re.fullmatch(r".+:\d+", spec.rdzv_endpoint):
        raise UserError(f"{spec.rdzv_endpoint!r} is not of the form host:port.")
    if spec.address != "unix":
        try:
            addresses.split(spec.address)
        except ValueError as error:
            raise UserError(f"{error}.", 'Use "unix" or tcp://host:port.') from error


def _code_version() -> list[object]:
    """The ranks' code: a sidecar that runs an older one is not adopted."""
    files = sorted((devices.PACK / "parallel_backend").rglob("*.py"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _free_port() -> int:
    """Of those below Linux' outgoing connections (from 32768 on), one of which could take it before a rank listens."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise SidecarError("No port of this host is free between 20000 and 32000.", "Name one with --rdzv-endpoint.")


def _write_token(path: Path, chosen: Path | None) -> None:
    token = _read_token(chosen) if chosen else secrets.token_urlsafe(32)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(token)


def _read_token(path: Path) -> str:
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise UserError(f"The token file {path} cannot be read: {error.strerror}.") from error
    if not token:
        raise UserError(f"The token file {path} is empty.")
    return token
