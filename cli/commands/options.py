"""Options that several commands share, and the sidecar that they ask for."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...launcher.devices import gpus_of
from ...launcher.spec import REMOTE_VARIABLE, TOKEN_VARIABLE, SidecarSpec, usual_token_file
from ...parallel_backend.errors import UserError

OK, FAILED, USAGE, NO_SIDECAR, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES = """exit codes:
  0    it worked
  1    it failed: the reason is on stderr
  2    the command line is wrong
  3    there is no sidecar
  130  interrupted"""


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
    add("--ranks", type=number(int, 0), default=0, help="ranks over all hosts; 0: every GPU, or 2 on CPU (default 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is a GPU")
    add(
        "--devices", default="", metavar="N,N", help="the GPUs that the ranks take, as in 0,1 (default: the first ones)"
    )
    add("--python", default=usual.python, help="interpreter of the ranks (default: this one)")
    add("--address", default="unix", help='"unix" or tcp://host:port (default unix)')
    add("--token-file", type=Path, help="file with the token that TCP clients must know")
    add("--nnodes", type=number(int, 1), default=1, help="hosts of the sidecar (default 1)")
    add("--node-rank", type=number(int, 0), default=0, help="which of them this is; host 0 takes the requests")
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
            type=number(float, 0),
            default=default,
            metavar="S",
            help=f"seconds {text} (default {default:g})",
        )


def add_remote_option(parser: argparse.ArgumentParser) -> None:
    """`--remote`, which `spec_of` reads too."""
    parser.add_argument(
        "--remote",
        default=os.environ.get(REMOTE_VARIABLE, ""),
        metavar="tcp://HOST:PORT",
        help="use the sidecar at this address, which was started elsewhere, and --token-file "
        f"(default: those of {REMOTE_VARIABLE} and {TOKEN_VARIABLE})",
    )


def spec_of(args: argparse.Namespace) -> SidecarSpec:
    names = (
        *("ranks", "device", "python", "address", "token_file", "nnodes", "node_rank", "rdzv_endpoint", "worker"),
        *("start_timeout", "compute_timeout", "hang_timeout", "idle_timeout"),
    )
    spec = SidecarSpec(**{name: getattr(args, name) for name in names}, gpus=gpus_of(args.devices))
    return replace(spec, **_elsewhere(args)) if getattr(args, "remote", "") else spec


def remote_spec(args: argparse.Namespace) -> SidecarSpec:
    """The sidecar elsewhere, for a command that has no other options of sidecars."""
    return SidecarSpec(**_elsewhere(args))


def _elsewhere(args: argparse.Namespace) -> dict[str, Any]:
    if getattr(args, "address", "unix") != "unix":
        raise UserError(f"--address {args.address} and --remote {args.remote} exclude each other.", "Leave one out.")
    return {"remote": True, "address": args.remote, "token_file": args.token_file or usual_token_file()}


def number(kind: type[int] | type[float], least: int) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be finite, is {text}")
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, is {text}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse
