"""Counts where the host waits for its CUDA GPU in a step of the demo model, by the line that waits.

    python tools/gpu_waits.py [--samplers euler dpmpp_2m euler_ancestral]

PyTorch's `torch.cuda.set_sync_debug_mode("warn")` warns at each call that waits. Two runs of different lengths are
made by a warm engine on one rank; the difference of their warnings over the difference of their steps is what a step
waits. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parallel_backend.distributed.control_group import ControlGroup
from parallel_backend.engine.engine import Engine
from parallel_backend.layout.layout import Layout
from parallel_backend.protocol import messages
from parallel_backend.run_context import Run

PACK = Path(__file__).resolve().parent.parent
MODEL = PACK / "demo_model" / "flux-tiny"
SHORT, LONG = 4, 12
"""Steps of the two runs."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", nargs="+", default=["euler", "dpmpp_2m", "euler_ancestral"])
    parser.add_argument("--device", default="cuda:0", help="cpu makes the same runs, where nothing is counted")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        store = FileStore(os.path.join(folder, "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        engine = Engine(device)
        print("| Sampler | Waits per step | Where |\n|---|---|---|")
        for sampler in arguments.samplers:
            _waits(engine, sampler, SHORT)  # It loads, and allocates.
            more = _waits(engine, sampler, LONG)
            more.subtract(_waits(engine, sampler, SHORT))
            places = [f"{place}: {count / (LONG - SHORT):g}" for place, count in more.most_common() if count > 0]
            total = f"{more.total() / (LONG - SHORT):g}" if device.type == "cuda" else "not counted"
            print(f"| {sampler} | {total} | {'; '.join(places)} |")
        dist.destroy_process_group()
    return 0


def _waits(engine: Engine, sampler: str, steps: int) -> Counter[str]:
    """How often each line waited in one guided run of a latent `[1, 16, 16, 16]`."""
    draw = torch.Generator().manual_seed(0)
    config = json.loads((MODEL / "transformer" / "config.json").read_text())
    tensors = {"latent": torch.zeros(1, 16, 16, 16)}
    for side, length in (("positive", 16), ("negative", 12)):
        tensors[f"{side}.0.tokens"] = torch.randn(1, length, config["joint_attention_dim"], generator=draw)
        tensors[f"{side}.0.pooled"] = torch.randn(1, config["pooled_projection_dim"], generator=draw)
    request = messages.Sample(
        id=1,
        model=messages.ModelRef(path=str(MODEL)),
        layout=Layout(),
        positive=(messages.Conditioning(),),
        negative=(messages.Conditioning(),),
        cfg=3.0,
        sampler=sampler,
        schedule=messages.Schedule(scheduler="simple", steps=steps),
        seed=1,
    )
    run = Run(ControlGroup(), 1, lambda *_: None)
    with warnings.catch_warnings(record=True) as seen, _warning_of_waits(engine.device):
        warnings.simplefilter("always")
        engine.handle(request, tensors, run)
    waits = [each for each in seen if "synchroniz" in str(each.message)]
    return Counter(f"{Path(each.filename).name}:{each.lineno}" for each in waits)


@contextmanager
def _warning_of_waits(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    sys.exit(main())
