"""Measures the ways to share a run between 2, 4 or 8 ranks, beside each other and beside diffusers: a table and a plot.

    python tools/bench.py [--ranks 2] [--only NAME] [--tokens 1024] [--rounds 8] [--width 768] [--plot bench.png]

A Flux.1 of random weights (121M parameters by default on two ranks, wider on 4 and 8: diffusers' Ulysses must be able
to divide the heads) in fp32, one thread per rank. The methods take turns, in another order every round, so that what
else the machine does falls on all of them alike. Step time: of the steps after the exact ones, for diffusers of one
forward. A guided run evaluates the model twice a step, and its speed-up counts both. Speed-up: over plain diffusers on
one rank; beside it the machine's own ceiling, which is what as many copies of that as there are ranks gain that share
nothing. Bytes: what the rank that sends most sends in a step.
Weights and peak: of the rank that has most, as tools/bench_memory.py measures them. Prints Markdown, and meanwhile on
stderr how far it is.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import bench_links
import bench_speedup
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_memory import MB, peak_memory
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.multiprocessing.spawn import spawn

from parallel_backend.distributed.control_group import ControlGroup
from parallel_backend.distributed.mesh import Mesh
from parallel_backend.engine.model import Transformer
from parallel_backend.layout.layout import Layout
from parallel_backend.layout.model_part import ModelPart

LAYOUTS = {
    2: {
        "ulysses2": Layout(ulysses_degree=2),
        "ring2": Layout(ring_degree=2),
        "tensor2": Layout(tensor_degree=2),
        "ulysses2, weights sharded": Layout(ulysses_degree=2, weights="sharded"),
        "pipefusion2": Layout(pipefusion_degree=2, num_patches=4),
        "pipefusion2, stage_blocks even": Layout(pipefusion_degree=2, num_patches=4, stage_blocks="even"),
        "distrifusion2": Layout(distrifusion_degree=2),
        "distrifusion2, in turn": Layout(distrifusion_degree=2, refresh="in_turn"),
    },
    4: {
        "ulysses4": Layout(ulysses_degree=4),
        "ring4": Layout(ring_degree=4),
        "ulysses2 x ring2": Layout(ulysses_degree=2, ring_degree=2),
        "cfg2 x ulysses2, guided": Layout(cfg_degree=2, ulysses_degree=2),
        "tensor4": Layout(tensor_degree=4),
        "tensor2 x ulysses2": Layout(tensor_degree=2, ulysses_degree=2),
        "ulysses4, weights sharded": Layout(ulysses_degree=4, weights="sharded"),
        "pipefusion4": Layout(pipefusion_degree=4, num_patches=8),
        "pipefusion4, stage_blocks even": Layout(pipefusion_degree=4, num_patches=8, stage_blocks="even"),
        "tensor2 x pipefusion2": Layout(tensor_degree=2, pipefusion_degree=2, num_patches=4),
        "ulysses2 x pipefusion2": Layout(ulysses_degree=2, pipefusion_degree=2, num_patches=4),
        "cfg2 x pipefusion2, guided": Layout(cfg_degree=2, pipefusion_degree=2, num_patches=4),
        "distrifusion4": Layout(distrifusion_degree=4),
    },
    8: {
        "ulysses8": Layout(ulysses_degree=8),
        "ring8": Layout(ring_degree=8),
        "ulysses4 x ring2": Layout(ulysses_degree=4, ring_degree=2),
        "cfg2 x ulysses2 x ring2, guided": Layout(cfg_degree=2, ulysses_degree=2, ring_degree=2),
        "tensor8": Layout(tensor_degree=8),
        "tensor2 x ulysses4": Layout(tensor_degree=2, ulysses_degree=4),
        "ulysses8, weights sharded": Layout(ulysses_degree=8, weights="sharded"),
        "pipefusion8": Layout(pipefusion_degree=8, num_patches=8),
        "tensor2 x pipefusion4": Layout(tensor_degree=2, pipefusion_degree=4, num_patches=8),
        "ulysses2 x pipefusion4": Layout(ulysses_degree=2, pipefusion_degree=4, num_patches=8),
        "cfg2 x pipefusion4, guided": Layout(cfg_degree=2, pipefusion_degree=4, num_patches=8),
        "distrifusion8": Layout(distrifusion_degree=8),
    },
}
"""By the number of ranks. Those with a CFG axis are `guided`."""
SERIAL = "diffusers, one rank"


def ceiling(ranks: int) -> str:
    return f"{ranks} copies of it"


def peers(ranks: int) -> dict[str, str]:
    """What they are called here, and in tools/bench_speedup.py."""
    return {
        SERIAL: bench_speedup.SERIAL,
        ceiling(ranks): bench_speedup.CEILING,
        f"diffusers, ulysses{ranks}": bench_speedup.RIVAL,
    }


@dataclass
class Measured:
    """Of one method: seconds per step of every round; for our own, MB per step and MB per rank."""

    seconds: list[float] = field(default_factory=list)
    sent: float | None = None
    weights: float | None = None
    peak: float | None = None
    evaluations: int = 1
    """Of the model, in each of those steps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, choices=LAYOUTS)
    parser.add_argument("--only", default="", help="only layouts with this in their name, and the peers")
    parser.add_argument("--tokens", type=int, default=1024, help="image tokens (a square)")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--width", type=int, default=0, help="hidden size (default: 768, of 4 and 8 ranks 1024)")
    parser.add_argument("--plot", type=Path, default=Path("output/bench.png"))
    parser.add_argument("--port", type=int, default=29575)
    arguments = parser.parse_args()
    arguments.width = arguments.width or (768 if arguments.ranks == 2 else 1024)
    if arguments.width % (128 * arguments.ranks):
        parser.error(
            f"--width {arguments.width} is no multiple of {128 * arguments.ranks}: diffusers' Ulysses needs heads (of "
            f"128) that the {arguments.ranks} ranks divide."
        )
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # so that memory that is freed goes back at once
    with tempfile.TemporaryDirectory() as folder:
        bench_speedup.build(arguments.width, torch.bfloat16).save_pretrained(folder)
        answers = mp.get_context("spawn").SimpleQueue()
        spawn(measure, args=(arguments, folder, answers), nprocs=arguments.ranks)
        results: dict[str, Measured] = answers.get()
    print("\n".join(table(results, arguments.ranks)))
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(results, arguments.ranks, arguments.plot)
    print(f"\n{arguments.plot}")


def measure(rank: int, arguments: argparse.Namespace, folder: str, answers) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    store = TCPStore("127.0.0.1", arguments.port, arguments.ranks, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=arguments.ranks)
    side = round(arguments.tokens**0.5)
    control, steps = ControlGroup(), bench_speedup.Models(arguments.width).variants(side)
    layouts = {name: layout for name, layout in LAYOUTS[arguments.ranks].items() if arguments.only in name}
    meshes = {name: Mesh(layout.degrees) for name, layout in layouts.items()}
    rivals = peers(arguments.ranks)
    results = {name: Measured() for name in rivals} | {
        name: Measured(evaluations=layout.cfg_degree) for name, layout in layouts.items()
    }
    order = random.Random(0)
    for round_number in range(arguments.rounds + 1):
        for name in order.sample(list(results), len(results)):
            if name in rivals:
                seconds, _ = bench_speedup.timed(rivals[name], steps[rivals[name]])
            else:
                seconds = sampled(layouts[name], meshes[name], control, folder, side, results[name])
            if round_number:  # what is measured first is slower
                results[name].seconds.append(seconds)
            if rank == 0:
                print(f"round {round_number} of {arguments.rounds}: {name}, {seconds:.3f} s", file=sys.stderr)
    if rank == 0:
        answers.put(results)
    dist.barrier()
    dist.destroy_process_group()


def sampled(layout: Layout, mesh: Mesh, control: ControlGroup, folder: str, side: int, measured: Measured) -> float:
    """Seconds per step of a run with a freshly loaded part of the model."""
    mesh.ledger.reset()
    gc.collect()  # the model of the run before
    with peak_memory() as peak:
        transformer = Transformer(Path(folder), torch.device("cpu"), "fp32", ModelPart.of(layout, mesh))
        seconds = bench_links.seconds_per_step(
            transformer.on(mesh), mesh, layout, control, side, text_tokens=bench_speedup.TEXT_TOKENS
        )
    sent = sum(traffic["bytes"] for traffic in mesh.ledger.summary().values()) / bench_links.STEPS
    most = torch.tensor([sent, transformer.bytes, peak.bytes], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    measured.sent, measured.weights, peak_mb = (most / MB).tolist()
    measured.peak = max(peak_mb, measured.peak or 0.0)
    return seconds


def speedup(results: dict[str, Measured], name: str, ranks: int) -> float:
    work = ranks if name == ceiling(ranks) else results[name].evaluations
    return work * median(results[SERIAL].seconds) / median(results[name].seconds)


def table(results: dict[str, Measured], ranks: int) -> list[str]:
    rows = [
        "| Method | median s | min s | speed-up | of the ceiling | MB sent per step | weights MB | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        memory = [f"{number:.1f}" if number is not None else "" for number in (found.sent, found.weights, found.peak)]
        gain = speedup(results, name, ranks)
        rows.append(
            f"| {name} | {median(found.seconds):.3f} | {min(found.seconds):.3f} | {gain:.2f} "
            f"| {gain / speedup(results, ceiling(ranks), ranks):.2f} | {' | '.join(memory)} |"
        )
    return rows


def plot(results: dict[str, Measured], ranks: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (gains, sent) = pyplot.subplots(1, 2, figsize=(11, 0.4 * len(results) + 1.2), sharey=True)
    names = list(results)[::-1]
    bars = gains.barh(names, [speedup(results, name, ranks) for name in names], color="tab:blue")
    gains.bar_label(bars, fmt="%.2f", padding=2)
    gains.axvline(speedup(results, ceiling(ranks), ranks), color="gray", linestyle=":")
    gains.set_xlabel("speed-up over diffusers on one rank (dotted: ceiling)")
    bars = sent.barh(names, [results[name].sent or 0.0 for name in names], color="tab:orange")
    sent.bar_label(bars, ["" if (mb := results[name].sent) is None else f"{mb:.1f}" for name in names], padding=2)
    for axes in (gains, sent):
        axes.margins(x=0.15)
    sent.set_xlabel("MB sent per rank and step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
