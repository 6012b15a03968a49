"""`cli plan`: which layouts fit a model, a picture and a number of ranks, asked without any rank."""

from __future__ import annotations

import argparse
import sys

from ...parallel_backend.errors import UserError
from ...parallel_backend.families.registry import FAMILIES
from ...parallel_backend.layout.fitting import check_layout, layouts_that_fit
from ...parallel_backend.layout.layout import Layout, parse_layout, patches_of
from ...parallel_backend.layout.rules import RunFacts
from .options import add_command
from .plan_memory import shapes_of, weight_bytes

MODELS = {
    name: (spec, config)
    for spec in FAMILIES.values()
    for name, config in ((spec.name, next(iter(spec.published.values()))), *spec.published.items())
}
"""The published models, and of each family the first, by its name."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, "plan", plan, "Say which layouts fit a model, a picture and ranks.")
    add = parser.add_argument
    add("--ranks", type=int, required=True, help="how many ranks there are")
    add("--family", choices=MODELS, required=True, help="or published model")
    add("--width", type=int, default=1024, help="of the picture, in pixels (default 1024)")
    add("--height", type=int, default=1024, help="of the picture, in pixels (default 1024)")
    add("--steps", type=int, default=20, help="of the run (default 20)")
    add("--batch", type=int, default=1, help="pictures (default 1)")
    add("--cfg", type=float, default=1.0, help="guidance by a negative prompt; 1: none (default 1)")
    add(
        "--layout", metavar="NAME=VALUE,…", help="judge this one, e.g. ulysses_degree=4,cfg_degree=2; default: list all"
    )
    add("--memory", action="store_true", help="say how much memory the weights take on each rank, in bf16")


def plan(args: argparse.Namespace) -> int:
    spec, config = MODELS[args.family]
    rows = spec.latent.stride[1] * spec.latent.patch[1]
    work = RunFacts(
        ranks=args.ranks,
        batch=args.batch,
        cfg=args.cfg,
        has_negative=args.cfg != 1.0,
        blocks=spec.count_blocks(config),
        token_rows=-(-args.height // rows),
        can=spec.can,
    )
    if args.layout:
        chosen = [parse_layout(args.layout)]
        check_layout(chosen[0], work)
    else:
        chosen = sorted(layouts_that_fit(Layout(), work), key=lambda layout: not layout.is_exact)
        if not chosen:
            raise UserError(f"No layout of {args.ranks} ranks fits.", "Use another number of ranks.")
    shapes = shapes_of(spec, config) if args.memory else {}
    for layout in chosen:
        memory = f", {weight_bytes(layout, spec, shapes) / 1e9:.1f} GB of weights per rank" if args.memory else ""
        print(f"{layout}: {describe(layout, work, args.steps)}{memory}")
    if not args.layout:
        print(f"{len(chosen)} layouts fit", file=sys.stderr)
    return 0


def describe(layout: Layout, work: RunFacts, steps: int) -> str:
    """Exact or not, and what a run of `steps` steps makes of a layout that fits."""
    if layout.is_exact:
        return "exact"
    if steps <= layout.warmup_steps:
        return f"exact, as warmup_steps={layout.warmup_steps} covers all {steps} steps"
    strips = f", {patches_of(layout, work.token_rows or 1)} patches" if layout.pipefusion_degree > 1 else ""
    return f"approximate after {layout.warmup_steps} exact steps{strips}"
