"""The commands of `python <pack>/launcher`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from ..parallel_backend.errors import Cancelled, UserError
from ..parallel_backend.protocol import messages, records
from ..parallel_backend.protocol.errors import ProtocolError
from . import plan_command
from .client import SidecarError
from .life import Life
from .runtime_dir import Slot
from .sidecar import SidecarSpec, connect, current, start, stop

OK, FAILED, USAGE, NO_SIDECAR, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES = """exit codes:
  0    it worked
  1    it failed: the reason is on stderr
  2    the command line is wrong
  3    there is no sidecar
  130  interrupted"""


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        return args.main(args)
    except (UserError, SidecarError) as error:
        print(f"error: {error.message}", *([f"hint: {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr)
    except ProtocolError as error:
        print(f"error: {error}", file=sys.stderr)
    except (Cancelled, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
    return FAILED


def add_command(
    commands: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """A subcommand with its help and exit codes; `run` gets the parsed arguments and returns the exit code."""
    parser = commands.add_parser(
        name, help=text, description=text, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(main=run)
    return parser


def add_sidecar_options(parser: argparse.ArgumentParser) -> None:
    """The options that shape a sidecar; `spec_of` reads them."""
    usual = SidecarSpec()
    add = parser.add_argument_group("sidecar").add_argument
    add("--ranks", type=_number(int, 0), default=0, help="ranks over all hosts; 0: every GPU, or 2 on CPU (default 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is a GPU")
    add("--python", default=usual.python, help="interpreter of the ranks (default: this one)")
    add("--address", default="unix", help='"unix" or tcp://host:port (default unix)')
    add("--token-file", type=Path, help="file with the token that TCP clients must know")
    add("--nnodes", type=_number(int, 1), default=1, help="hosts of the sidecar (default 1)")
    add("--node-rank", type=_number(int, 0), default=0, help="which of them this is; host 0 takes the requests")
    add("--rdzv-endpoint", default="", metavar="HOST:PORT", help="where the hosts meet: a free port of host 0")
    add("--worker", default=usual.worker, metavar="MODULE", help=f"what every rank runs (default {usual.worker})")
    for name, text in (
        ("start-timeout", "until all ranks have met"),
        ("compute-timeout", "for a rank that waits for its peers; 0: 1800 on CPU, 600 on CUDA"),
        ("hang-timeout", "of silence after which a rank counts as hung"),
        ("idle-timeout", "without a request until the sidecar ends; 0: never"),
    ):
        default = getattr(usual, name.replace("-", "_"))
        add(
            f"--{name}",
            type=_number(float, 0),
            default=default,
            metavar="S",
            help=f"seconds {text} (default {default:g})",
        )


def spec_of(args: argparse.Namespace) -> SidecarSpec:
    names = (
        *("ranks", "device", "python", "address", "token_file", "nnodes", "node_rank", "rdzv_endpoint", "worker"),
        *("start_timeout", "compute_timeout", "hang_timeout", "idle_timeout"),
    )
    return SidecarSpec(**{name: getattr(args, name) for name in names})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launcher",
        description="Run workflows through a sidecar of parallel ranks, and look after the sidecar.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    if find_spec(f"{__package__}.run_command"):
        from . import bench_command, run_command

        run_command.add_parser(commands)
        bench_command.add_parser(commands)
    add_sidecar_options(
        add_command(commands, "start", _start, "Start a sidecar that lives until it is stopped or idle.")
    )
    plan_command.add_options(
        add_command(commands, "plan", plan_command.plan, "Say which layouts fit a model, a picture and ranks.")
    )
    for name, run, text in (
        ("status", _status, "Show the sidecar: ranks, memory, models, what it is doing."),
        ("stop", _stop, "End the sidecar and everything that belongs to it."),
        ("logs", _logs, "Print the end of the sidecar's logs."),
    ):
        command = add_command(commands, name, run, text)
        command.add_argument("--node-rank", type=_number(int, 0), default=0, help="this host's part of several")
        if name in ("status", "logs"):
            command.add_argument(
                "--vae", action="store_true", help="the second sidecar, of a VAE with ranks of its own"
            )
        if name == "status":
            command.add_argument("--json", action="store_true", help="as one JSON object")
        if name == "logs":
            command.add_argument(
                "--rank", type=_number(int, 0), help="this rank only (default: torchrun and all ranks)"
            )
            command.add_argument("--lines", type=_number(int, 1), default=40, help="lines of each log (default 40)")
    return parser


def _number(kind: type[int] | type[float], least: int) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, is {text}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def _start(args: argparse.Namespace) -> int:
    life = start(spec_of(args), _say, owned=False)
    settings = life.settings
    if settings:
        print(f"{settings.ranks} ranks on {settings.device}, address {settings.address}, directory {life.path}")
        if settings.address != "unix" and settings.node_rank == 0:
            print(f"token file: {life.path / records.TokenFile}")
    return OK


def _stop(args: argparse.Namespace) -> int:
    slot = Slot(args.node_rank)
    ended = {name: stop(each, _say) for name, each in (("", slot), (" of the VAE", slot.beside))}
    if not any(ended.values()):
        return _no_sidecar(slot)
    for name, was_alive in ended.items():
        if was_alive:
            print(f"the sidecar{name} has ended")
    return OK


def _status(args: argparse.Namespace) -> int:
    life = current(Slot(args.node_rank).beside)
    if not args.vae and not args.json and life is not None and life.is_alive:
        print("a sidecar of the VAE runs, too: see status --vae", file=sys.stderr)
    return _status_of(_slot(args), args)


def _slot(args: argparse.Namespace) -> Slot:
    slot = Slot(args.node_rank)
    return slot.beside if args.vae else slot


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
    print(json.dumps(data) if args.json else "\n".join(_describe(life.settings, data)))
    return OK


def _describe(settings: records.Settings, data: dict[str, object]) -> list[str]:
    lines = [f"{settings.ranks} ranks on {settings.device}, address {settings.address}, directory {data['directory']}"]
    if "uptime_s" not in data:
        return [*lines, "starting" if settings.node_rank == 0 else f"host {settings.node_rank}: its ranks run"]
    lines.append(f"up for {data['uptime_s']:.0f} s, {'busy: ' + json.dumps(data['busy']) if data['busy'] else 'idle'}")
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


def _log_names(life: Life) -> list[str]:
    return sorted(path.name for path in life.path.glob("*.log"))


def _no_sidecar(slot: Slot) -> int:
    life = current(slot)
    print(f"no sidecar runs in {slot.directory}", file=sys.stderr)
    if life and life.end:
        print(f"the last one ended: {life.end.message}", file=sys.stderr)
    return NO_SIDECAR


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
