"""Measures how a slow link between two hosts slows each method down: a curve over bandwidths.

    sudo .venv/bin/python tools/bench_links.py [--mbits 0 1000 300 100] [--rounds 3] [--side 32] [--plot PNG]

Makes two network namespaces joined by a cable whose rate is limited (token bucket; 0: not limited), and runs one rank
in each, one thread a rank: a Flux.1 of 9 blocks and random weights, in turns with every method. Prints Markdown:
seconds per step (median of the runs, over the steps after the exact ones), how many times as fast as Ulysses, and what
a rank sends per step; then how many times as fast PipeFusion is by theory, here and with the 57 blocks of Flux.1.
`--plot` draws the curve. Needs root, `ip` and `tc` (Linux, iproute2), and says so where they are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parallel_backend.distributed.control_group import ControlGroup
from parallel_backend.distributed.mesh import Mesh
from parallel_backend.engine.sample import sample
from parallel_backend.families.family import Family
from parallel_backend.families.flux import Flux
from parallel_backend.layout.layout import Layout
from parallel_backend.protocol.messages import Conditioning, ModelRef, Progress, Sample, Schedule
from parallel_backend.run_context import Run

LAYOUTS = {
    "ulysses2": Layout(ulysses_degree=2),
    "ring2": Layout(ring_degree=2),
    "distrifusion2": Layout(distrifusion_degree=2),
    "distrifusion2, in turn": Layout(distrifusion_degree=2, refresh="in_turn"),
    "pipefusion2, 4 patches": Layout(pipefusion_degree=2, num_patches=4, stage_blocks="even"),
}
BASELINE, PIPED = "ulysses2", "pipefusion2, 4 patches"
BLOCKS, FLUX_BLOCKS = 9, 57
STEPS = 6
HOSTS = ("paralleldit0", "paralleldit1")
ADDRESSES = ("10.251.7.1", "10.251.7.2")
TEXT_TOKENS, TEXT_WIDTH, POOLED_WIDTH = 64, 256, 64

Results = dict[str, tuple[float, float]]
"""Seconds and bytes per step of every method."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbits", type=int, nargs="+", default=[0, 1000, 300, 100], help="Mbit/s; 0: not limited")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=512, help="hidden size, a multiple of 128")
    parser.add_argument("--side", type=int, default=32, help="rows of image tokens")
    parser.add_argument("--plot", type=Path, help="where to draw the curve")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        measure(arguments)
        return
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if missing or os.geteuid() != 0:
        raise SystemExit(f"This needs root and iproute2; missing: {', '.join(missing) or 'root'}.")
    print(f"9 blocks of width {arguments.width}, {arguments.side**2} image tokens, {arguments.rounds} runs.\n")
    print("| Link | Method | s per step | times as fast as Ulysses | MB sent per step |\n|---|---|---|---|---|")
    by_link: dict[int, Results] = {}
    for mbits in arguments.mbits:
        with hosts(mbits):
            results = by_link[mbits] = run_ranks(arguments)
        for name, (seconds, sent) in results.items():
            gain = results[BASELINE][0] / seconds
            print(f"| {link(mbits)} | {name} | {seconds:.3f} | {gain:.2f} | {sent / 1e6:.1f} |", flush=True)
    if 0 in by_link:
        print(
            f"\n| Link | {BLOCKS} blocks, measured | by theory | {FLUX_BLOCKS} blocks, by theory |\n|---|---|---|---|"
        )
        for mbits, results in by_link.items():
            gains = [results[BASELINE][0] / results[PIPED][0]]
            gains += [gain_by_theory(by_link[0], mbits, blocks) for blocks in (BLOCKS, FLUX_BLOCKS)]
            print(f"| {link(mbits)} | {' | '.join(f'{gain:.2f}' for gain in gains)} |")
    if arguments.plot:
        plot(by_link, arguments.plot)


def link(mbits: int) -> str:
    return f"{mbits} Mbit/s" if mbits else "not limited"


def gain_by_theory(unlimited: Results, mbits: int, blocks: int) -> float:
    """How many times as fast as Ulysses PipeFusion is: each block's exchanges are waited for, each patch's are not."""
    more = blocks / BLOCKS
    rate = mbits * 1e6 / 8 or float("inf")
    (computed, sent), (piped, handed_on) = unlimited[BASELINE], unlimited[PIPED]
    return more * (computed + sent / rate) / max(more * piped, handed_on / rate)


def plot(by_link: dict[int, Results], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    rates = sorted(by_link, key=lambda mbits: mbits or float("inf"))
    for name in LAYOUTS:
        axes.plot([link(mbits) for mbits in rates], [by_link[mbits][name][0] for mbits in rates], "o-", label=name)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("seconds per step")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@contextmanager
def hosts(mbits: int) -> Iterator[None]:
    """Two namespaces joined by a cable of that rate in each direction."""
    try:
        for host in HOSTS:
            call("ip", "netns", "add", host)
        call("ip", "link", "add", "cable0", "netns", HOSTS[0], "type", "veth", "peer", "cable1", "netns", HOSTS[1])
        for index, (host, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True)):
            cable = f"cable{index}"
            call("ip", "-n", host, "address", "add", f"{address}/24", "dev", cable)
            for device in ("lo", cable):
                call("ip", "-n", host, "link", "set", device, "up")
            if mbits:
                # A burst of a millisecond, so that a small message is not let through as if the link were fast.
                burst = max(3000, mbits * 1000 // 8)
                rate = ("rate", f"{mbits}mbit", "burst", f"{burst}", "latency", "100ms")
                call("tc", "-n", host, "qdisc", "add", "dev", cable, "root", "tbf", *rate)
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True)


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()}")


def run_ranks(arguments: argparse.Namespace) -> Results:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        options = {"rounds": arguments.rounds, "width": arguments.width, "side": arguments.side}
        command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
        ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", host, *command, f"--rank={rank}", f"--results={results}"],
                env={**os.environ, "GLOO_SOCKET_IFNAME": f"cable{rank}"},
            )
            for rank, host in enumerate(HOSTS)
        ]
        if any([rank.wait() for rank in ranks]):
            raise SystemExit("A rank failed; its error is above.")
        return {name: tuple(figures) for name, figures in json.loads(results.read_text()).items()}


def measure(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rank = arguments.rank
    store = TCPStore(ADDRESSES[0], 29577, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=128,
        num_attention_heads=arguments.width // 128,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
    ).eval()
    family, control = Flux(transformer, torch.float32, torch.device("cpu")), ControlGroup()
    meshes = {name: Mesh(layout.degrees) for name, layout in LAYOUTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    sent = {}
    with torch.inference_mode():
        for _ in range(arguments.rounds):
            for name, layout in LAYOUTS.items():
                meshes[name].ledger.reset()
                seconds[name].append(seconds_per_step(family, meshes[name], layout, control, arguments.side))
                sent[name] = sum(traffic["bytes"] for traffic in meshes[name].ledger.summary().values()) / STEPS
    if rank == 0:
        results = {name: (median(runs), sent[name]) for name, runs in seconds.items()}
        arguments.results.write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def seconds_per_step(
    family: Family, mesh: Mesh, layout: Layout, control: ControlGroup, side: int, text_tokens: int = TEXT_TOKENS
) -> float:
    """Of the steps after the exact ones; all but the last are told of when the first rank has their latent.

    With a CFG axis the run is guided.
    """
    guided = layout.cfg_degree > 1
    request = Sample(
        id=1,
        model=ModelRef(path="given"),
        layout=layout,
        positive=(Conditioning(),),
        negative=(Conditioning(),) if guided else (),
        cfg=float(layout.cfg_degree),
        sampler="euler",
        schedule=Schedule(scheduler="simple", steps=STEPS),
        seed=0,
    )
    tensors = {"latent": torch.zeros(1, 16, 2 * side, 2 * side)}
    for name in ("positive", "negative") if guided else ("positive",):
        tensors[f"{name}.0.tokens"] = torch.randn(1, text_tokens, TEXT_WIDTH)
        tensors[f"{name}.0.pooled"] = torch.randn(1, POOLED_WIDTH)
    told: dict[int, float] = {}

    def send(event: object, tensors: object) -> None:
        if isinstance(event, Progress):
            told[event.step] = time.perf_counter()

    dist.barrier()
    sample(request, tensors, family, mesh, Run(control, request.id, send))
    span = torch.zeros(1)
    if dist.get_rank() == 0:
        span += (told[STEPS] - told[2]) / (STEPS - 2)
    dist.broadcast(span, 0)
    return span.item()


if __name__ == "__main__":
    main()
