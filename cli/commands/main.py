"""The parser of all commands, and what their failures print."""

from __future__ import annotations

import argparse
import sys

from ...launcher.client import SidecarError
from ...parallel_backend.errors import Cancelled, UserError
from ...parallel_backend.protocol.errors import ProtocolError
from . import bench, plan, run, sidecar, study
from .options import EXIT_CODES, FAILED, INTERRUPTED


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
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
    return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli",
        description="Run workflows through a sidecar of parallel ranks, and look after the sidecar.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (run, bench, study, plan, sidecar):
        command.add_parser(commands)
    return parser
