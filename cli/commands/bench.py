"""`cli bench`: the run of a saved workflow in one layout after the other, measured side by side."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ...launcher import lifecycle
from ...parallel_backend.errors import UserError
from ...parallel_backend.layout.layout import Layout, parse_layout
from ...parallel_backend.protocol.messages import Memory, Progress, Request, Sample, Unload, Welcome
from .options import add_command, add_remote_option, add_sidecar_options, spec_of
from .workflow_options import add_workflow_options, pair, read_workflow

if TYPE_CHECKING:
    from torch import Tensor

    from ...launcher.client import Client, Event
    from ...launcher.spec import SidecarSpec

TEXT = """Measure how long the sampling of a saved API-format workflow takes, in one layout after the other.
The workflow runs up to its Parallel Sampler, with the models, prompts, size and steps that it names; that
run is then repeated in the layouts to be measured, in turns, and with one rank alone. Prints Markdown: the
times of a run without loading, the speed-up over one rank, what rank 0 sends per step, the memory in use
on the fullest rank, and how far the latent is from that of one rank (relative; 0 where nothing differs).
With --no-alone the first layout is in the place of one rank."""
ALONE = "one rank"


class Captured(Exception):
    """The workflow has come to its sampler: this is what it asks of the ranks."""

    def __init__(self, message: Sample, tensors: Mapping[str, Tensor], welcome: Welcome) -> None:
        super().__init__("the workflow has come to its sampler")
        self.message, self.tensors, self.ranks = message, tensors, welcome.ranks


@dataclass
class Measured:
    """Runs in one layout: seconds of each, and of the last one what rank 0 sent per step, what the fullest rank had in
    use, both in bytes, and the latent."""

    seconds: list[float] = field(default_factory=list)
    sent: float = 0.0
    used: int = 0
    latent: Tensor | None = None


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, "bench", main, TEXT)
    add_workflow_options(parser)
    add = parser.add_argument
    add(
        "--layout",
        action="append",
        default=[],
        metavar="NAME=VALUE,…",
        help="measure this one, e.g. ulysses_degree=4,cfg_degree=2; may be given several times. Default: every method "
        "alone, and pairs of them, as far as they fit",
    )
    add("--rounds", type=int, default=3, help="runs in every layout, after one that does not count (default 3)")
    add("--no-alone", dest="alone", action="store_false", help="leave out one rank, which may lack the memory")
    add_sidecar_options(parser)
    add_remote_option(parser)


def main(args: argparse.Namespace) -> int:
    from ...nodes import host
    from ...nodes.layout_choice import LayoutChoice
    from ...nodes.session import session

    if args.rounds < 1:
        raise UserError(f"--rounds is {args.rounds}, but it is at least 1.")
    if args.remote and args.alone:
        raise UserError(f"One rank alone cannot be started at {args.remote}.", "Add --no-alone.")
    # As they were given: the name of a layout leaves out settings in which two of them may differ.
    chosen = {text: parse_layout(text) for text in args.layout}
    spec = spec_of(args)
    run = captured(args, spec)
    usual = usual_layouts(run.ranks, guided=bool(run.message.negative))
    layouts = chosen or {str(layout): layout for layout in usual}
    host.use(host.Host(models=args.models, spec=spec, owned=False, say=_say))
    client = session.client_for(LayoutChoice(ranks=run.ranks))
    results = in_turns(client, run, layouts, args.rounds)
    if args.alone:
        client.request(Unload(id=0))
        with one_rank(spec) as alone:
            results = in_turns(alone, run, {ALONE: Layout()}, args.rounds) | results
    if not results:
        raise UserError("The run can be made in none of these layouts: the reasons are above.")
    print(*table(results), sep="\n")
    return 0


def captured(args: argparse.Namespace, spec: SidecarSpec) -> Captured:
    """The workflow, run as far as to what its sampler asks of the ranks. Raises `UserError` if it asks nothing."""
    from ...nodes import NODE_CLASS_MAPPINGS, host
    from ..headless.core_nodes import Folders, core_nodes
    from ..headless.runner import begin_workflow

    class CapturingHost(host.Host):
        def sending(self, message: Request, tensors: Mapping[str, Tensor], welcome: Welcome) -> None:
            if isinstance(message, Sample):
                raise Captured(message, tensors, welcome)

    host.use(CapturingHost(models=args.models, spec=spec, owned=False, say=_say))
    with tempfile.TemporaryDirectory() as folder:
        classes = {**core_nodes(Folders(args.input, Path(folder), Path(folder))), **NODE_CLASS_MAPPINGS}
        try:
            begin_workflow(
                read_workflow(args.workflow), classes=classes, set_values=dict(pair(each) for each in args.set)
            ).finish()
        except Captured as run:
            return run
    raise UserError(f"The workflow {args.workflow} samples nothing.", "Choose one with a Parallel Sampler.")


def usual_layouts(ranks: int, *, guided: bool) -> list[Layout]:
    """Every method alone on so many ranks, and pairs of them that share the ranks by two. Those that cannot run there
    are found out by asking the ranks."""
    names = ("ulysses", "ring", "tensor", "distrifusion", "pipefusion")
    alone = [Layout.model_validate({f"{name}_degree": ranks}) for name in names]
    alone.insert(4, Layout(ulysses_degree=ranks, weights="sharded"))
    alone.append(Layout(pipefusion_degree=ranks, stage_blocks="even"))
    if guided and ranks == 2:
        alone.insert(0, Layout(cfg_degree=2))
    half, odd = divmod(ranks, 2)
    if odd or half < 2:
        return alone if ranks > 1 else [Layout()]
    pairs = [("ulysses", "ring"), ("tensor", "ulysses"), ("ulysses", "pipefusion"), ("tensor", "pipefusion")]
    if guided:
        pairs = [("cfg", "ulysses"), ("cfg", "pipefusion"), *pairs]
    return alone + [Layout.model_validate({f"{two}_degree": 2, f"{other}_degree": half}) for two, other in pairs]


@contextmanager
def one_rank(spec: SidecarSpec) -> Iterator[Client]:
    """A second sidecar, of one rank, for the duration of the context."""
    with tempfile.TemporaryDirectory(prefix="paralleldit-") as folder:
        alone = replace(spec, ranks=1, nnodes=1, node_rank=0, rdzv_endpoint="", address="unix", directory=Path(folder))
        try:
            yield lifecycle.ensure_sidecar(alone, _say)
        finally:
            lifecycle.stop(alone.slot)


def in_turns(client: Client, run: Captured, layouts: Mapping[str, Layout], rounds: int) -> dict[str, Measured]:
    """Measures runs in these layouts, in another order every round. Layouts that do not fit are named and skipped."""
    results: dict[str, Measured] = {}
    for name, layout in layouts.items():
        try:
            sampled(client, run, layout)
            results[name] = Measured()
        except UserError as error:
            _say(f"{name} is left out: {error}")
    for number in range(rounds):
        for name, measured in random.sample(list(results.items()), len(results)):
            seconds, measured.sent, measured.used, measured.latent = sampled(client, run, layouts[name])
            measured.seconds.append(seconds)
            _say(f"round {number + 1} of {rounds}: {name} {seconds:.2f} s")
    return results


def sampled(client: Client, run: Captured, layout: Layout) -> tuple[float, float, int, Tensor]:
    """Seconds of a run, without loading; bytes that rank 0 sent per step and that the fullest rank uses; the latent."""
    used, steps = 0, 1

    def on_event(event: Event, tensors: Any) -> None:
        nonlocal used, steps
        if isinstance(event, Memory):
            used = max(event.used)
        if isinstance(event, Progress) and event.phase == "sample":
            steps = event.total

    result, tensors = client.request(run.message.model_copy(update={"layout": layout}), run.tensors, on_event)
    data: dict[str, Any] = result.data
    sent = sum(traffic["bytes"] for traffic in data["traffic"].values())
    return data["seconds"], sent / steps, used, tensors["latent"]


def table(results: Mapping[str, Measured]) -> list[str]:
    """Markdown. Compared with the first row."""
    first = next(iter(results.values()))
    lines = [
        f"| Layout | median s | min s | speed-up | MB sent per step | GB in use | differs from {next(iter(results))} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, measured in results.items():
        speedup = median(first.seconds) / median(measured.seconds)
        lines.append(
            f"| {name} | {median(measured.seconds):.3f} | {min(measured.seconds):.3f} | {speedup:.2f} "
            f"| {measured.sent / 1e6:.1f} | {measured.used / 1e9:.2f} | {_distance(measured, first):.1e} |"
        )
    return lines


def _distance(measured: Measured, first: Measured) -> float:
    assert measured.latent is not None
    assert first.latent is not None
    return float((measured.latent - first.latent).norm() / first.latent.norm())


def _say(text: str) -> None:
    print(text, file=sys.stderr)
