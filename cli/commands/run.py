"""`cli run`: executes a saved API-format workflow without ComfyUI."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...parallel_backend.errors import UserError
from ...parallel_backend.protocol.messages import Request, Welcome
from .options import add_command, add_remote_option, add_sidecar_options, spec_of
from .report import Report
from .workflow_options import add_workflow_options, pair, read_workflow

if TYPE_CHECKING:
    from torch import Tensor

    from ..headless.runner import OnShown, WorkflowRun

TEXT = """Run a saved API-format workflow without ComfyUI, for servers, scripts and tests.
ComfyUI is the pack's host: only the pack's own nodes and a few core nodes run here
(empty latents, LoadImage, SaveImage, PreviewImage, primitives)."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, "run", main, TEXT)
    add = parser.add_argument
    add_workflow_options(parser)
    add("--prompts", type=Path, metavar="FILE", help="run once for every line of FILE")
    add("--into", metavar="NODE.INPUT", help="the input that takes the lines of --prompts")
    add("--output", type=Path, default=Path("output"), help="folder of the pictures (default: output)")
    add_sidecar_options(parser)
    add_remote_option(parser)


def main(args: argparse.Namespace) -> int:
    from ...nodes import NODE_CLASS_MAPPINGS, host
    from ..headless.core_nodes import Folders, core_nodes
    from ..headless.runner import begin_workflow, finish_meanwhile

    api = read_workflow(args.workflow)
    values = dict(pair(each) for each in args.set)
    folders = Folders(args.input, args.output, args.output / "temp")
    classes = {**core_nodes(folders), **NODE_CLASS_MAPPINGS}
    cache: dict[str, tuple[Any, ...]] = {}
    report = Report()

    class TerminalHost(host.Host):
        number = 0

        def prompt(self) -> object:
            return self.number

        def sending(self, message: Request, tensors: Mapping[str, Tensor], welcome: Welcome) -> None:
            report.sending(message, welcome)

    here = TerminalHost(
        models=args.models, spec=spec_of(args), owned=False, on_progress=report.progress, say=report.say
    )
    host.use(here)

    def runs() -> Iterator[tuple[WorkflowRun, OnShown]]:
        for prompt in _prompts(args):
            here.number += 1
            with report.run():
                run = begin_workflow(api, classes=classes, set_values=values | prompt, cache=cache)
            yield run, partial(report.end, report.summary())

    finish_meanwhile(runs())
    return 0


def _prompts(args: argparse.Namespace) -> list[dict[str, str]]:
    """The values to set in each run: none in the only one, or a line of the prompts' file in each."""
    if bool(args.prompts) != bool(args.into):
        raise UserError("--prompts and --into belong together.", "Example: --prompts prompts.txt --into Positive.text")
    if not args.prompts:
        return [{}]
    try:
        lines = args.prompts.read_text().splitlines()
    except OSError as error:
        raise UserError(f"The prompts {args.prompts} cannot be read: {error.strerror}.") from error
    return [{args.into: line} for line in lines if line.strip()]
