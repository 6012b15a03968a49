"""Compares layouts and methods with the serial run on the demo model's held-out captions.

    python tools/quality --layout ulysses_degree=2 --layout pipefusion_degree=2,num_patches=4,warmup_steps=1
    python tools/quality --preset pipefusion --sheet quality.png
    python tools/quality --size 128 --steps 28 --layout ulysses_degree=2 --layout cfg_degree=2 --all-caches
    python tools/quality --layout ulysses_degree=2 --cache 0.1 --cache threshold=0.2,order=1 --rival first-block=0.1

Every method samples the same captions from the same noise through real ranks; the serial run is one rank, and is itself
compared with the stock diffusers pipeline. Prints a Markdown table: PSNR and SSIM (mean over the pictures) against the
serial pictures, PSNR of the worst picture, the share of the asked attributes that the demo model's checker finds, the
evaluations that a step cache computed in full, and how many times as fast as without a cache the layout sampled. Caches
of others (--rival) sample in plain diffusers, in this process, and their gain is over plain diffusers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ...parallel_backend.errors import UserError
from ...parallel_backend.layout.layout import Layout, parse_layout
from ..demo_model.checkpoint import TARGET
from ..demo_model.evaluate import held_out
from .methods import ALL_CACHES, PRESETS, Method, parse_cache
from .report import Row, sheet, table
from .rivals import ALL_RIVALS, RIVALS, parse_rival, sample_by
from .sampling import Diffusers, Made, Task, encode, sample, sidecar

SERIAL = Method(Layout())
LARGEST_ERROR = 1e-4
"""Of the serial latents, relative to plain diffusers, after all steps."""


def main() -> int:
    options = parse_options()
    scenes = held_out(options.prompts, options.size)
    task = Task(
        model=options.model.resolve(),
        captions=tuple(scene.caption() for scene in scenes),
        size=options.size,
        steps=options.steps,
        cfg=options.cfg,
        batch=options.batch,
        seed=options.seed,
    )
    try:
        chosen = [layout for name in options.preset for layout in PRESETS[name]]
        chosen += [parse_layout(text) for text in options.layout]
        asked = [*options.cache, *(ALL_CACHES if options.all_caches else ())]
        caches = [parse_cache(text, options.model.resolve()) for text in asked]
        layouts = list(dict.fromkeys([SERIAL.layout, *chosen]))
        methods = [Method(layout, cache) for layout in layouts for cache in (None, *caches)]
        rivals = [parse_rival(text) for text in (*options.rival, *(ALL_RIVALS if options.all_caches else ()))]
        made, error = run(task, methods)
        plain = sample_by(None, task) if rivals else None
        others = [(rival, sample_by(rival, task)) for rival in rivals]
    except UserError as problem:
        print(problem, file=sys.stderr)
        return 2
    if error > LARGEST_ERROR:
        print(f"The serial run differs from plain diffusers by {error:.1e}: nothing can be compared.", file=sys.stderr)
        return 1
    seconds = {method.layout: each.seconds for method, each in made if method.cache is None}
    serial, *rows = [
        Row(
            "serial" if method == SERIAL else str(method),
            each.pictures,
            each.whole if method.cache else None,
            seconds[method.layout] / each.seconds if method.cache else None,
        )
        for method, each in made
    ]
    if plain is not None:
        rows += [Row(str(rival), each.pictures, each.whole, plain.seconds / each.seconds) for rival, each in others]
    print(f"{options.prompts} held-out captions, {task.size} px, {task.steps} steps of Euler, CFG {task.cfg:g}.")
    print(f"The serial latents equal plain diffusers' to {error:.0e} (relative).\n")
    print(table(serial, rows, scenes))
    if options.sheet is not None:
        sheet(serial, rows, task.captions[: options.sheet_rows]).save(options.sheet)
    return 0


def run(task: Task, methods: list[Method]) -> tuple[list[tuple[Method, Made]], float]:
    """What every method makes, the serial one first, in order, and the serial run's relative error to plain diffusers.

    One sidecar is started for each number of ranks.
    """
    diffusers = Diffusers(task)
    sigmas = diffusers.sigmas()
    made: dict[Method, Made] = {}
    conditioning = None
    for ranks in sorted({method.layout.ranks for method in methods}):
        with sidecar(ranks) as client:
            if conditioning is None:
                conditioning = encode(client, task)
            for method in methods:
                if method.layout.ranks == ranks:
                    print(f"{method} ...", file=sys.stderr, flush=True)
                    made[method] = sample(client, method, task, conditioning, sigmas)
    print("plain diffusers ...", file=sys.stderr, flush=True)
    expected = diffusers.latents()
    error = float((made[SERIAL].latents - expected).norm() / expected.norm())
    return [(method, made[method]) for method in methods], error


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tools/quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layout", action="append", default=[], metavar="NAME=VALUE,...", help="a layout; may be given several times")
    add("--preset", action="append", default=[], choices=sorted(PRESETS), help="a list of layouts")
    add("--cache", action="append", default=[], metavar="THRESHOLD,NAME=VALUE,...", help="a step cache for each layout")
    add(
        "--rival", action="append", default=[], metavar="NAME=THRESHOLD", help=f"a cache of others: {', '.join(RIVALS)}"
    )
    add("--all-caches", action="store_true", help="every kind of cache, and of others' that are installed")
    add("--prompts", type=int, default=16, help="number of held-out captions (default 16)")
    add("--size", type=int, default=256, help="side of the pictures in px (default 256)")
    add("--steps", type=int, default=20)
    add("--cfg", type=float, default=3.5, help="guidance scale against the empty prompt (default 3.5)")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=8, help="pictures per request (default 8)")
    add("--model", type=Path, default=TARGET, help="diffusers folder (default: the demo model)")
    add("--sheet", type=Path, help="write the pictures side by side here (PNG)")
    add("--sheet-rows", type=int, default=8, help="captions on the sheet (default 8)")
    return parser.parse_args()
