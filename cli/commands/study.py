"""`cli study`: measures where a model's blocks change little from step to step, and writes a schedule for caches."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...parallel_backend.errors import UserError
from ...parallel_backend.layout.layout import Layout, parse_layout
from .bench import Captured, captured
from .options import add_command, add_remote_option, add_sidecar_options, spec_of
from .workflow_options import add_workflow_options

if TYPE_CHECKING:
    from ...launcher.client import Client
    from ...nodes.study.findings import Measured

TEXT = """Measure how much every block of a model changes from step to step (arXiv 2411.13588).
A saved API-format workflow runs up to its Parallel Sampler; that run is made for every prompt of --prompts,
every number of --steps and every sampler of --samplers. Prints how much the runs have in common, draws a
heat map of each, and writes the schedule that Parallel Cache takes."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, "study", main, TEXT)
    add_workflow_options(parser)
    add = parser.add_argument
    add("--prompts", type=Path, metavar="FILE", help="a study of every line of FILE")
    add("--into", metavar="NODE.INPUT", help="the input that takes the lines of --prompts")
    add("--steps", type=_numbers, default=[], metavar="N,…", help="numbers of steps (default: the workflow's)")
    add("--samplers", type=_names, default=[], metavar="NAME,…", help="samplers (default: the workflow's)")
    add("--layout", type=parse_layout, default=Layout(), help="of the runs, e.g. cfg_degree=2 (default: one rank)")
    add("--output", type=Path, default=Path("output"), help="folder of the heat maps (default: output)")
    add("--no-save", dest="save", action="store_false", help="do not write the schedule beside the model")
    add_sidecar_options(parser)
    add_remote_option(parser)


def main(args: argparse.Namespace) -> int:
    from ...nodes import host
    from ...nodes.layout_choice import LayoutChoice
    from ...nodes.session import session
    from ...nodes.study.findings import Findings
    from ...nodes.study.heatmaps import heat_maps

    runs = list(_captured(args))
    host.use(host.Host(models=args.models, spec=spec_of(args), owned=False, say=_say))
    client = session.client_for(LayoutChoice(ranks=args.layout.ranks))
    args.output.mkdir(parents=True, exist_ok=True)
    model, found = Path(runs[0].message.model.path), []
    for number, run in enumerate(runs, start=1):
        for measured in _measured(args, client, run, f"prompt {number}"):
            found.append(measured)
            for kind, picture in zip(("change", "cosine"), heat_maps(measured.changes, measured.name), strict=True):
                picture.save(args.output / f"study {len(found)} {kind}.png")
    findings = Findings.of(found)
    print(findings.text())
    if args.save:
        print(f"Written to {findings.save(model)}.")
    return 0


def _captured(args: argparse.Namespace) -> Iterator[Captured]:
    """What the workflow asks of the ranks, for each prompt."""
    if bool(args.prompts) != bool(args.into):
        raise UserError("--prompts and --into belong together.", "Example: --prompts prompts.txt --into Positive.text")
    given = args.set
    lines = [line for line in args.prompts.read_text().splitlines() if line.strip()] if args.prompts else [None]
    for line in lines:
        args.set = given if line is None else [*given, f"{args.into}={line}"]
        yield captured(args, spec_of(args))


def _measured(args: argparse.Namespace, client: Client, run: Captured, prompt: str) -> Iterator[Measured]:
    from ...nodes.session import session
    from ...nodes.study.findings import Measured

    schedule = run.message.schedule
    if schedule is None:
        raise UserError("The workflow gives noise levels instead of a schedule.", "Use Parallel Sampler's scheduler.")
    for steps in args.steps or [schedule.steps]:
        for sampler in args.samplers or [run.message.sampler]:
            changed = schedule.model_copy(update={"steps": steps})
            settings = {"schedule": changed, "sampler": sampler, "layout": args.layout, "study": True, "cache": None}
            name = f"{prompt}, {steps} steps of {sampler}"
            _say(f"{name} ...")
            reply = session.ask(client, run.message.model_copy(update=settings), run.tensors)
            yield Measured.of(name, reply.tensors)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")
