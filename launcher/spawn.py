"""Starts torchrun, waits until its ranks are ready, and passes on the token."""

from __future__ import annotations

import os
import secrets
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..parallel_backend.errors import UserError
from ..parallel_backend.machine.clock import RunningClock
from ..parallel_backend.protocol import records
from . import devices, interpreter
from .client import NotBegun, SidecarError
from .host_checks import check_host
from .instance import SidecarInstance
from .runtime_dir import ROOT_VARIABLE, Slot, explained, passed_over
from .spec import SidecarSpec

Say = Callable[[str], None]

PROGRESS_S = 5.0
STOPPED_S = 5.0
"""How long a process may be stopped while the sidecar starts."""


def launch(
    slot: Slot, spec: SidecarSpec, settings: records.Settings, owner: records.Process | None, on_progress: Say
) -> SidecarInstance:
    for why in passed_over() if spec.directory is None else ():
        on_progress(f"{why} The sidecar's directory is {slot.directory} instead; {ROOT_VARIABLE} may name another.")
    with explained(slot.directory):
        return _launch(slot, spec, settings, owner, on_progress)


def _launch(
    slot: Slot, spec: SidecarSpec, settings: records.Settings, owner: records.Process | None, on_progress: Say
) -> SidecarInstance:
    life = SidecarInstance(slot.new_life())
    check_host(settings, life.path)
    records.write(life.path / records.SettingsFile, settings)
    life.own(owner)
    if settings.address != "unix":
        _write_token(life.path / records.TokenFile, spec.token_file)
    on_progress(f"starting {len(settings.local_ranks)} of {settings.ranks} ranks on {settings.device}")
    agent = _spawn(life, spec, settings)
    try:
        records.write(
            life.path / records.AgentFile, records.Process(pid=agent.pid, started=records.started(agent.pid) or 0)
        )
        _wait_ready(life, agent, settings, spec.start_timeout, on_progress)
    except BaseException:
        # Nobody asks why it ended. The kernel ends the ranks with it.
        agent.kill()
        life.kill()
        agent.wait()
        raise
    threading.Thread(target=agent.wait, name="torchrun reaper", daemon=True).start()
    return life


def _spawn(life: SidecarInstance, spec: SidecarSpec, settings: records.Settings) -> subprocess.Popen[bytes]:
    single = settings.nnodes == 1
    several_hosts = (
        *(f"--node-rank={settings.node_rank}", "--rdzv-backend=static", f"--rdzv-endpoint={settings.store}"),
        f"--rdzv-conf=timeout={spec.start_timeout:.0f}",
    )
    command = [
        *interpreter.command(spec.python, "parallel_backend.worker.torchrun", str(life.path)),
        *(f"--nnodes={settings.nnodes}", f"--nproc-per-node={len(settings.local_ranks)}"),
        *(("--rdzv-backend=one-host", "--local-addr=127.0.0.1") if single else several_hosts),
        *("--max-restarts=0", "--shutdown-timeout=5"),
        *("--no-python", *interpreter.command(spec.python, settings.worker, str(life.path))),
    ]
    env = devices.rank_environment(
        settings.device, len(settings.local_ranks), single_host=single, base=os.environ, gpus=spec.gpus
    )
    env = interpreter.environment(env, spec.python)
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
    life: SidecarInstance, agent: subprocess.Popen[bytes], settings: records.Settings, timeout: float, on_progress: Say
) -> None:
    clock, local = RunningClock(), len(settings.local_ranks)
    began = clock.now()
    said_at, said, running_at = began, 0, began
    while not life.is_ready:
        now, up, stopped = clock.now(), len(life.ranks), life.stopped
        if agent.poll() is not None or life.end is not None:
            raise _ended(life, agent)
        running_at = running_at if stopped else now
        if now - running_at > STOPPED_S:
            name, pid = next(iter(stopped.items()))
            why = f"its {name} (process {pid}) is stopped, by a signal or a debugger."
            raise NotBegun(f"The sidecar did not start: {why}", f"The logs are in {life.path}.")
        if now - began > timeout:
            raise SidecarError(
                f"The sidecar did not start within {timeout:g} s: {up} of the {local} ranks of this host are up"
                + ("." if up < local else ", but they have not all met."),
                f"Use fewer ranks, or a longer --start-timeout. The logs are in {life.path}.",
            )
        if up > said or now - said_at > PROGRESS_S:
            said_at, said = now, up
            on_progress(f"{up} of {local} ranks are up after {now - began:.0f} s")
        time.sleep(0.05)
    on_progress(f"the sidecar is ready after {clock.now() - began:.1f} s")


def _ended(life: SidecarInstance, agent: subprocess.Popen[bytes]) -> SidecarError:
    """Why the sidecar ended before it was ready. Where a signal ended it, another one may start."""
    message, hint = life.why_not_started()
    is_killed = life.end.is_killed if life.end else (agent.poll() or 0) < 0
    kind = NotBegun if is_killed else SidecarError
    return kind(f"The sidecar did not start: {message}", f"{hint} The logs are in {life.path}.".strip())


def _write_token(path: Path, chosen: Path | None) -> None:
    token = read_token(chosen) if chosen else secrets.token_urlsafe(32)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(token)


def read_token(path: Path) -> str:
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise UserError(f"The token file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The token file {path} holds no text in UTF-8.", "Write the token as text.") from error
    if not token:
        raise UserError(f"The token file {path} is empty.")
    return token
