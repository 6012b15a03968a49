"""`start`, `stop`, `status` and `logs`: look after the sidecar."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from ...launcher.instance import SidecarInstance
from ...launcher.lifecycle import connect, current, start, stop, visit
from ...launcher.runtime_dir import Slot, slots
from ...launcher.spec import SidecarSpec
from ...parallel_backend.errors import UserError
from ...parallel_backend.protocol import messages, records
from .options import (
    NO_SIDECAR,
    OK,
    add_command,
    add_remote_option,
    add_sidecar_options,
    number,
    remote_spec,
    spec_of,
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    add_sidecar_options(
        add_command(commands, "start", _start, "Start a sidecar that lives until it is stopped or idle.")
    )
    for name, run, text in (
        ("status", _status, "Show the sidecar: ranks, memory, models, what it is doing."),
        ("stop", _stop, "End the sidecar and everything that belongs to it."),
        ("logs", _logs, "Print the end of the sidecar's logs."),
    ):
        command = add_command(commands, name, run, text)
        command.add_argument("--node-rank", type=number(int, 0), default=0, help="this host's part of several")
        if name in ("status", "logs"):
            command.add_argument(
                "--vae", action="store_true", help="the second sidecar, of a VAE with ranks of its own"
            )
        if name == "stop":
            command.add_argument(
                "--force", action="store_true", help="even while it works for another client, whose run then fails"
            )
        if name == "status":
            add_remote_option(command)
            command.add_argument("--token-file", type=Path, help="file with the token of --remote")
            command.add_argument("--json", action="store_true", help="as one JSON object")
        if name == "logs":
            command.add_argument("--rank", type=number(int, 0), help="this rank only (default: torchrun and all ranks)")
            command.add_argument("--lines", type=number(int, 1), default=40, help="lines of each log (default 40)")


def _start(args: argparse.Namespace) -> int:
    life = start(spec_of(args), _say, owned=False)
    settings = life.settings
    if settings:
        print(f"{settings.ranks} ranks on {settings.device}, address {settings.address}, directory {life.path}")
        if settings.address != "unix" and settings.node_rank == 0:
            print(f"token file: {life.path / records.TokenFile}")
    return OK


def _stop(args: argparse.Namespace) -> int:
    found = slots(args.node_rank)
    several = [(name, each) for slot in found for name, each in (("", slot), (" of the VAE", slot.vae))]
    ended = [name for name, each in several if each.life is not None and stop(each, _say, force=args.force)]
    for name in ended:
        print(f"the sidecar{name} has ended")
    return OK if ended else _no_sidecar(found[0])


def _status(args: argparse.Namespace) -> int:
    if args.remote:
        return _status_elsewhere(remote_spec(args), args)
    lives = [current(slot.vae) for slot in slots(args.node_rank)]
    if not args.vae and not args.json and any(life is not None and life.is_alive for life in lives):
        print("a sidecar of the VAE runs, too: see status --vae", file=sys.stderr)
    return _status_of(_slot(args), args)


def _status_elsewhere(spec: SidecarSpec, args: argparse.Namespace) -> int:
    client = visit(spec)
    assert client is not None
    reply, _ = client.request(messages.Status(id=0))
    client.close()
    heading = f"{client.welcome.ranks} ranks on {client.welcome.device}, address {spec.address}"
    print(json.dumps(reply.data) if args.json else "\n".join([heading, *_describe(reply.data)]))
    return OK


def _slot(args: argparse.Namespace) -> Slot:
    """Of the usual places the one where a sidecar lives, or has lived; else the first."""
    found = [slot.vae if args.vae else slot for slot in slots(args.node_rank)]
    living = [slot for slot in found if (life := current(slot)) is not None and life.is_alive]
    return next(iter([*living, *(slot for slot in found if slot.life), *found]))


def _status_of(slot: Slot, args: argparse.Namespace) -> int:
    life = current(slot)
    if life is None or not life.is_alive or life.settings is None:
        return _no_sidecar(slot)
    data: dict[str, object] = {"settings": life.settings.model_dump(), "directory": str(life.path)}
    if life.settings.node_rank == 0 and life.is_ready:
        try:
            reply, _ = connect(life).request(messages.Status(id=0))
        except OSError:
            return _no_sidecar(slot)
        data |= reply.data
    settings = life.settings
    heading = f"{settings.ranks} ranks on {settings.device}, address {settings.address}, directory {life.path}"
    if "uptime_s" in data:
        lines = _describe(data)
    else:
        lines = ["starting" if settings.node_rank == 0 else f"host {settings.node_rank}: its ranks run"]
    print(json.dumps(data) if args.json else "\n".join([heading, *lines]))
    return OK


def _describe(data: Mapping[str, object]) -> list[str]:
    lines = [f"up for {data['uptime_s']:.0f} s, {'busy: ' + json.dumps(data['busy']) if data['busy'] else 'idle'}"]
    for name in ("models", "traffic"):
        if data[name]:
            lines.append(f"{name}: {json.dumps(data[name])}")
    ranks = data["ranks"]
    assert isinstance(ranks, list)
    for rank in ranks:
        rest = {name: value for name, value in rank.items() if name not in ("rank", "pid", "host", "models", "traffic")}
        lines.append(f"rank {rank['rank']} on {rank['host']}, process {rank['pid']}: {json.dumps(rest)}")
    return lines


def _logs(args: argparse.Namespace) -> int:
    life = current(_slot(args))
    if life is None:
        return _no_sidecar(_slot(args))
    names = _log_names(life) if args.rank is None else [records.rank_log(args.rank)]
    for name in names:
        path = life.path / name
        if not path.exists():
            raise UserError(f"There is no {path}.", f"Logs of this sidecar: {', '.join(_log_names(life))}.")
        print(f"==> {path} <==")
        with open(path, errors="replace") as file:
            print(*deque(file, args.lines), sep="", end="")
    return OK


def _log_names(life: SidecarInstance) -> list[str]:
    return sorted(path.name for path in life.path.glob("*.log"))


def _no_sidecar(slot: Slot) -> int:
    life = current(slot)
    print(f"no sidecar runs in {slot.directory}", file=sys.stderr)
    if life and life.end:
        print(f"the last one ended: {life.end.message}", file=sys.stderr)
    return NO_SIDECAR


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
