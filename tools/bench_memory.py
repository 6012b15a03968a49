"""Measures what a rank holds of a model, and the most that it uses while it samples, for each way to divide a model.

    python tools/bench_memory.py [--width 512] [--side 16] [--only NAME] [--folder DIR]

Writes a Flux.1 of random weights (19 double and 38 single blocks as the published ones, 330M parameters by default) in
bf16 into a temporary folder, and samples two steps of a square picture in fp32 with every layout, in fresh processes.
Weights: what the rank that holds most has in memory, for sharded weights with the two blocks that are put together at
a time. Peak: anonymous memory of the rank that uses most, above the same rank's before it loads, sampled all the while
(the file's pages are the host's own cache, and not counted). Prints a Markdown table. Linux only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.multiprocessing.spawn import spawn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parallel_backend.distributed.control_group import ControlGroup
from parallel_backend.distributed.mesh import Mesh
from parallel_backend.engine.model import Transformer
from parallel_backend.engine.sample import sample
from parallel_backend.layout.layout import Layout
from parallel_backend.layout.model_part import ModelPart
from parallel_backend.protocol.messages import Conditioning, ModelRef, Sample, Schedule
from parallel_backend.run_context import Run

LAYOUTS = [
    Layout(),
    Layout(ulysses_degree=2),
    *(Layout(tensor_degree=degree) for degree in (2, 4)),
    *(Layout(ulysses_degree=degree, weights="sharded") for degree in (2, 4)),
    *(Layout(pipefusion_degree=degree) for degree in (2, 4)),
    Layout(pipefusion_degree=2, stage_blocks="even"),
    Layout(tensor_degree=2, ulysses_degree=2, weights="sharded"),
    Layout(tensor_degree=2, pipefusion_degree=2),
]
HEAD_DIM, TEXT_TOKENS, TEXT_WIDTH, POOLED_WIDTH = 128, 64, 512, 64
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="hidden size, a multiple of 128")
    parser.add_argument("--side", type=int, default=16, help="rows of image tokens")
    parser.add_argument("--only", default="", help="only layouts with this in their name, e.g. sharded")
    parser.add_argument("--folder", help="where to put the temporary folder (0.7 GB)")
    parser.add_argument("--port", type=int, default=29574)
    arguments = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # so that memory that is freed goes back at once
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        parameters = write_model(folder, arguments.width)
        print(f"{parameters / 1e6:.0f}M parameters, fp32: {parameters * 4 / MB:.0f} MB.\n")
        print("| Layout | Ranks | Weights per rank (MB) | of the model | Peak per rank (MB) |\n|---|---|---|---|---|")
        for layout in (layout for layout in LAYOUTS if arguments.only in str(layout)):
            answers = mp.get_context("spawn").SimpleQueue()
            spawn(measure, args=(layout, folder, arguments, answers), nprocs=layout.ranks)
            weights, peaks = zip(*(answers.get() for _ in range(layout.ranks)), strict=True)
            share = max(weights) / (parameters * 4)
            print(
                f"| {layout} | {layout.ranks} | {max(weights) / MB:.0f} | {share:.3f} | {max(peaks) / MB:.0f} |",
                flush=True,
            )


def write_model(folder: str, width: int) -> int:
    """Returns the number of parameters."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        attention_head_dim=HEAD_DIM,
        num_attention_heads=width // HEAD_DIM,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
    )
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    return model.num_parameters()


def measure(rank: int, layout: Layout, folder: str, arguments: argparse.Namespace, answers) -> None:
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", arguments.port, layout.ranks, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=layout.ranks)
    mesh, control = Mesh(layout.degrees), ControlGroup()
    request, tensors = request_of(layout, arguments.side)
    with torch.inference_mode(), peak_memory() as peak:
        transformer = Transformer(Path(folder), torch.device("cpu"), "fp32", ModelPart.of(layout, mesh))
        sample(request, tensors, transformer.on(mesh), mesh, Run(control, request.id, lambda *_: None))
    answers.put((transformer.bytes, peak.bytes))
    dist.barrier()
    dist.destroy_process_group()


def request_of(layout: Layout, side: int) -> tuple[Sample, dict[str, torch.Tensor]]:
    request = Sample(
        id=1,
        model=ModelRef(path="given"),
        layout=layout,
        positive=(Conditioning(),),
        sampler="euler",
        schedule=Schedule(scheduler="simple", steps=2),
        seed=0,
    )
    tensors = {
        "latent": torch.zeros(1, 16, 2 * side, 2 * side),
        "positive.0.tokens": torch.randn(1, TEXT_TOKENS, TEXT_WIDTH),
        "positive.0.pooled": torch.randn(1, POOLED_WIDTH),
    }
    return request, tensors


@contextmanager
def peak_memory() -> Iterator[SimpleNamespace]:
    """`bytes`: the most that this process has used above what it uses now."""
    peak, done, idle = SimpleNamespace(bytes=0), threading.Event(), anonymous_memory()

    def watch() -> None:
        while not done.wait(0.01):
            peak.bytes = max(peak.bytes, anonymous_memory() - idle)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def anonymous_memory() -> int:
    """Bytes of this process that are no file's pages."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


if __name__ == "__main__":
    main()
