"""Measures time and memory of decoding a picture: plain diffusers, diffusers' tiles, DistVAE, and our bands of rows.

    python tools/bench_vae.py [--pixels 1024] [--width 8] [--rounds 3] [--only NAME] [--port 29575]

An AutoencoderKL of random weights in fp32, its levels `width` times 1, 2, 4 and 4 channels wide (128: the published
ones), one thread per rank, each way in fresh processes. "two copies": two plain decodes at once, each by itself: the
machine's ceiling for two ranks. Seconds: the median and the least of the rounds, of the slowest rank, after a first one
that is not counted. Peak: anonymous memory of the rank that uses most above its own before the first round, sampled all
the while. Prints a Markdown table. Linux only.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import AutoencoderKL

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parallel_backend.comm import Axis, Ledger
from parallel_backend.vae.decode import decode
from parallel_backend.vae.load import LoadedVAE

WAYS = {
    "plain diffusers": ("plain", 1),
    "diffusers' tiles": ("tiles", 1),
    "two copies": ("plain", 2),
    "DistVAE, 2 ranks": ("distvae", 2),
    "DistVAE, 4 ranks": ("distvae", 4),
    "bands, 2 ranks": ("bands", 2),
    "bands, 4 ranks": ("bands", 4),
    "bands, 8 ranks": ("bands", 8),
}
"""What the table calls it: what each rank does, and the number of ranks."""
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=1024, help="side of the picture, a multiple of 8")
    parser.add_argument("--width", type=int, default=8, help="channels of the level of most pixels, a multiple of 4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only ways with this in their name, e.g. bands")
    parser.add_argument("--port", type=int, default=29575)
    arguments = parser.parse_args()
    print("| Way | Median (s) | Least (s) | Peak per rank (MB) |\n|---|---|---|---|")
    for name, (way, ranks) in WAYS.items():
        if arguments.only not in name:
            continue
        with mp.Manager() as manager:
            answers = manager.list()
            mp.spawn(_rank, args=(ranks, way, arguments, answers), nprocs=ranks)
            seconds = [max(of_round) for of_round in zip(*(each[0] for each in answers), strict=True)]
            peak = max(each[1] for each in answers)
        print(f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} | {peak / MB:.0f} |", flush=True)


@torch.inference_mode()
def _rank(rank: int, ranks: int, way: str, arguments: argparse.Namespace, answers: list) -> None:
    torch.set_num_threads(1)
    init = f"tcp://127.0.0.1:{arguments.port}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=ranks)
    work = _work(way, ranks, arguments)
    seconds = []
    with _peak() as peak:
        for _ in range(1 + arguments.rounds):
            dist.barrier()
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
    answers.append((seconds[1:], peak[0]))
    dist.barrier()
    dist.destroy_process_group()


def _work(way: str, ranks: int, arguments: argparse.Namespace) -> Callable[[], object]:
    torch.manual_seed(1)
    module = AutoencoderKL(
        block_out_channels=tuple(arguments.width * factor for factor in (1, 2, 4, 4)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=4 if arguments.width < 32 else 32,
    )
    module = module.eval().requires_grad_(False)
    latent = torch.randn(1, 16, arguments.pixels // 8, arguments.pixels // 8)
    if way == "bands":
        axis = Axis("world", range(ranks), dist.group.WORLD, Ledger())
        vae = LoadedVAE(module, "bench")
        return lambda: decode(vae, latent, axis)
    if way == "tiles":
        module.enable_tiling()
    elif way == "distvae":
        from distvae.vae import parallelize_decoder

        parallelize_decoder(module, dist.group.WORLD)
    return lambda: module.decode(latent)


@contextmanager
def _peak() -> Iterator[list[int]]:
    """A list whose one number is the most bytes of anonymous memory used inside, above what was used at its start."""
    before, done, most = _anonymous(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], _anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def _anonymous() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
