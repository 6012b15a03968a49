"""Measures the speed-up of two ranks over one on this machine, beside the machine's own ceiling and two rivals.

    python tools/bench_speedup.py [--tokens 1024 2304 4096] [--rounds 10] [--width 768]

One step of a Flux.1 of random weights (121M parameters by default, fp32), on one thread per rank:

- `serial`: plain diffusers on one rank, the other one idle: what a speed-up is measured against;
- `engine, 1 rank`: our engine on one rank;
- `two copies`: plain diffusers on both ranks at once, each its own step. Twice the serial time over this time is the
  ceiling: what two of this machine's cores are worth together;
- `ulysses 2`, `ring 2`: our engine on both ranks;
- `diffusers ulysses 2`: diffusers' own context parallelism (made to accept CPU ranks);
- `two threads`: plain diffusers in one process with two threads.

The variants take turns, in another order every round, so that what else the machine does falls on all of them alike.
Prints Markdown: medians, ratios of medians and of minima, the share of the ceiling, and the CPU seconds of all ranks
together over the serial run's.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig  # pyright: ignore[reportPrivateImportUsage]
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.multiprocessing.spawn import spawn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parallel_backend.attention.kernels import KERNELS
from parallel_backend.attention.usp import AttentionCore
from parallel_backend.distributed.axis import Axis
from parallel_backend.distributed.ledger import Ledger
from parallel_backend.distributed.mesh import Mesh
from parallel_backend.families.condition import Condition
from parallel_backend.families.flux import Flux
from parallel_backend.layout.layout import Layout
from parallel_backend.strategies.sequence import SequenceParallel

TEXT_TOKENS = 128
SERIAL = "serial"
CEILING = "two copies"
RIVAL = "diffusers ulysses 2"
LONE = {SERIAL, "engine, 1 rank", "two threads"}
"""Variants that run on rank 0 while rank 1 waits."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2304, 4096], help="image tokens (squares)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--width", type=int, default=768, help="hidden size, a multiple of 128")
    parser.add_argument("--port", type=int, default=29573)
    arguments = parser.parse_args()
    spawn(measure, args=(arguments,), nprocs=2)


def measure(rank: int, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    store = TCPStore("127.0.0.1", arguments.port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    models = Models(arguments.width)
    if rank == 0:
        print(f"{models.parameters / 1e6:.0f}M parameters, {TEXT_TOKENS} text tokens, medians of {arguments.rounds}\n")
    for tokens in arguments.tokens:
        side = round(tokens**0.5)
        variants = models.variants(side)
        results = {name: run_together(name, step) for name, step in variants.items()}
        check_equal(results)
        times: dict[str, list[float]] = {name: [] for name in variants}
        cpu: dict[str, list[float]] = {name: [] for name in variants}
        order = random.Random(0)
        for _ in range(arguments.rounds):
            for name in order.sample(list(variants), len(variants)):
                seconds, cpu_seconds = timed(name, variants[name])
                times[name].append(seconds)
                cpu[name].append(cpu_seconds)
        if rank == 0:
            print(table(side * side, times, cpu), flush=True)
    dist.destroy_process_group()


class Models:
    """One set of random weights as plain diffusers, as our engine, and as diffusers' context parallelism; all ranks."""

    def __init__(self, width: int) -> None:
        # An idle machine has no accelerator, and diffusers counts ranks by accelerators.
        ranks = dist.get_world_size()
        torch.accelerator.device_count = lambda: ranks
        self.plain = build(width)
        with torch.device("meta"):
            engine_module, self.context_parallel = build(width), build(width)
        for model in (engine_module, self.context_parallel):
            model.load_state_dict(self.plain.state_dict(), assign=True)
        self.parameters = sum(parameter.numel() for parameter in self.plain.parameters())
        self.context_parallel.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
        self.family = Flux(engine_module, torch.float32, torch.device("cpu"))
        alone = [Axis(name, [dist.get_rank()], None, Ledger()) for name in ("ulysses", "ring", "sequence")]
        self.engines = {
            "engine, 1 rank": engine(self.family, *alone),
            "ulysses 2": engine(self.family, *axes_of(Mesh(Layout(ulysses_degree=ranks)))),
            "ring 2": engine(self.family, *axes_of(Mesh(Layout(ring_degree=ranks)))),
        }

    def variants(self, side: int) -> dict[str, Callable[[], torch.Tensor]]:
        generator = torch.Generator().manual_seed(3)
        latent = torch.randn(1, 16, 2 * side, 2 * side, generator=generator)
        text = torch.randn(1, TEXT_TOKENS, 256, generator=generator)
        pooled = torch.randn(1, 64, generator=generator)
        sigma = torch.tensor([0.7])
        condition = Condition({"tokens": text, "pooled": pooled}, guidance=3.5)
        ids = torch.zeros(side * side, 3)
        ids[:, 1] = torch.arange(side).repeat_interleave(side)
        ids[:, 2] = torch.arange(side).repeat(side)

        def plain(model: FluxTransformer2DModel) -> torch.Tensor:
            output = model(
                hidden_states=self.family.tokenise({"image": latent})["image"],
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=sigma,
                img_ids=ids,
                txt_ids=torch.zeros(TEXT_TOKENS, 3),
                guidance=torch.tensor([3.5]),
                return_dict=False,
            )[0]
            return self.family.untokenise({"image": output}, {"image": latent})["image"]

        def two_threads() -> torch.Tensor:
            torch.set_num_threads(2)
            output = plain(self.plain)
            torch.set_num_threads(1)
            return output

        def ours(name: str) -> Callable[[], torch.Tensor]:
            return lambda: self.engines[name].predict(latent, sigma, condition)

        return {
            SERIAL: lambda: plain(self.plain),
            **{name: ours(name) for name in self.engines},
            CEILING: lambda: plain(self.plain),
            RIVAL: lambda: plain(self.context_parallel),
            "two threads": two_threads,
        }


def build(width: int, dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=128,
        num_attention_heads=width // 128,
        joint_attention_dim=256,
        pooled_projection_dim=64,
        guidance_embeds=True,
    )
    nn.Module.to(model, dtype)
    return model.eval()


def engine(family: Flux, ulysses: Axis, ring: Axis, sequence: Axis) -> SequenceParallel:
    return SequenceParallel(family, sequence, AttentionCore(ulysses, ring, KERNELS["sdpa"]))


def axes_of(mesh: Mesh) -> tuple[Axis, Axis, Axis]:
    return mesh.ulysses, mesh.ring, mesh.sequence


def run_together(name: str, step: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    dist.barrier()
    return step() if dist.get_rank() == 0 or name not in LONE else None


def timed(name: str, step: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """Seconds of the slower rank, and CPU seconds of both."""
    dist.barrier()
    started, cpu_started = time.perf_counter(), time.process_time()
    if dist.get_rank() == 0 or name not in LONE:
        step()
    seconds = torch.tensor([time.perf_counter() - started])
    cpu_seconds = torch.tensor([time.process_time() - cpu_started])
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    dist.all_reduce(cpu_seconds)
    return seconds.item(), cpu_seconds.item()


def check_equal(results: dict[str, torch.Tensor | None]) -> None:
    expected = results[SERIAL]
    for name, result in results.items():
        if result is not None and expected is not None:
            error = float((result - expected).norm() / expected.norm())
            if error > 1e-5:
                raise SystemExit(f"{name} differs from serial by {error:.1e}: timings of it would mean nothing.")


def table(tokens: int, times: dict[str, list[float]], cpu: dict[str, list[float]]) -> str:
    serial = times[SERIAL]

    def speedup(name: str, of: Callable[[list[float]], float]) -> float:
        copies = 2 if name == CEILING else 1
        return copies * of(serial) / of(times[name])

    top = speedup(CEILING, median)
    rows = [
        f"| {tokens} image tokens | median s | min s | speed-up | of minima | of the ceiling | CPU work |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seconds in times.items():
        work = median(cpu[name]) / median(cpu[SERIAL]) / (2 if name == CEILING else 1)
        rows.append(
            f"| {name} | {median(seconds):.3f} | {min(seconds):.3f} | {speedup(name, median):.2f} "
            f"| {speedup(name, min):.2f} | {speedup(name, median) / top:.2f} | {work:.2f} |"
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
