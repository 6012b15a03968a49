"""Many prompts and many cancels by the same ranks: does anything grow, differ or go slower?

    python tools/chaos soak [--prompts 500] [--cancels 200] [--every 50] [--seed 0]

Runs the demo workflow (text, sampling, VAE) on two CPU ranks, in every layout in turn, in sizes and batches that
change. Every so many prompts it notes the memory, files and threads of the ranks and of this process, has one prompt of
each layout again, whose latent must be the first one bit for bit, and has the ranks unload their models. Then it
cancels runs at moments drawn by chance, and notes how long each took to leave. Prints Markdown tables; fails where a
prompt fails, a latent differs, or the sidecar is not the one of the beginning.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from ...cli.headless.core_nodes import Folders, core_nodes
from ...cli.headless.runner import begin_workflow
from ...launcher import lifecycle
from ...launcher.spec import SidecarSpec
from ...nodes import NODE_CLASS_MAPPINGS, host
from ...nodes.session import session
from ...parallel_backend.errors import Cancelled

PACK = Path(__file__).resolve().parents[2]
LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "cfg": {"cfg_degree": 2},
    "data": {"data_degree": 2},
    "tensor": {"tensor_degree": 2},
    "sharded": {"ulysses_degree": 2, "weights": "sharded"},
    "pipefusion": {"pipefusion_degree": 2},
    "distrifusion": {"distrifusion_degree": 2},
}
SIZES = ((128, 128), (160, 128), (128, 192))
PATHS = {"2.model": "flux-tiny", "3.text_encoders": "flux-tiny", "4.text_encoders": "flux-tiny", "7.vae": "flux-tiny"}
PROMPT_STEPS, CANCELLED_STEPS = 3, 20
LATEST_STEP, LATEST_S = 12, 0.3
"""A cancel comes so long at most after a step that is this one at most."""
TEXTS = ("a yellow star", "two blue circles on green", "a red square above a white circle")
MB = 1e6
HEAD = (
    *("prompts", "rank 0 MB", "rank 1 MB", "torchrun MB", "client MB"),
    *("files of rank 0", "threads of rank 0", "s a prompt"),
)


class Soak(host.Host):
    """Runs the demo workflow, and cancels it where that is asked for."""

    def __init__(self, directory: Path) -> None:
        spec = SidecarSpec(ranks=2, device="cpu", directory=directory / "run")
        super().__init__(spec=spec, on_progress=self._progress, say=lambda text: None)
        self._api = json.loads((PACK / "workflows" / "api" / "demo_txt2img.api.json").read_text())
        self._classes = {**core_nodes(Folders(directory, directory, directory)), **NODE_CLASS_MAPPINGS}
        self._paths = {place: str(PACK / "demo_model" / name) for place, name in PATHS.items()}
        self._cancel_at: tuple[int, float] | None = None
        self.cancelled_at: float | None = None

    def _progress(self, phase: str, step: int, total: int, preview: object) -> None:
        if phase == "sample" and self._cancel_at and step >= self._cancel_at[0]:
            delay, self._cancel_at = self._cancel_at[1], None
            threading.Timer(delay, self._cancel).start()

    def _cancel(self) -> None:
        self.cancelled_at = time.monotonic()

    def cancelled(self) -> bool:
        return self.cancelled_at is not None

    def run(self, layout: str, steps: int, **values: object) -> torch.Tensor:
        """The latent of one prompt; its picture is decoded, too."""
        batch = 2 if layout == "data" else 1
        own = {f"1.{name}": value for name, value in LAYOUTS[layout].items()}
        asked = {**self._paths, **own, "5.batch_size": batch, "6.steps": steps, **values}
        set_values = {place: str(value) for place, value in asked.items()}
        outputs, _ = begin_workflow(self._api, classes=self._classes, set_values=set_values).finish()
        return outputs["6"][0]["samples"]

    def cancel(self, layout: str, step: int, delay: float) -> float | None:
        """Seconds from a cancel, `delay` seconds after a step, to its end; None where the run was over before."""
        self._cancel_at, self.cancelled_at = (step, delay), None
        try:
            self.run(layout, CANCELLED_STEPS)
        except Cancelled:
            assert self.cancelled_at is not None
            return time.monotonic() - self.cancelled_at
        finally:
            time.sleep(LATEST_S if self._cancel_at is None else 0)
            self._cancel_at = self.cancelled_at = None
        return None

    def processes(self) -> list[psutil.Process]:
        """Of the ranks in order, of torchrun, and of this one."""
        life = lifecycle.current(self.spec.slot)
        assert life is not None
        assert life.agent is not None
        ranks = [life.ranks[rank].pid for rank in sorted(life.ranks)]
        return [psutil.Process(pid) for pid in (*ranks, life.agent.pid, psutil.Process().pid)]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/chaos soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--cancels", type=int, default=200)
    parser.add_argument("--every", type=int, default=50, help="prompts between two rows (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of sizes, texts and moments (default 0)")
    args = parser.parse_args(sys.argv[2:])
    chances = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as directory:
        here = Soak(Path(directory))
        host.use(here)
        try:
            fixed = {layout: here.run(layout, PROMPT_STEPS) for layout in LAYOUTS}
            pids = [process.pid for process in here.processes()]
            differing = _prompts(here, args.prompts, args.every, fixed, chances)
            _cancels(here, args.cancels, chances)
            differing += _differing(here, fixed)
            is_same = pids == [process.pid for process in here.processes()]
        finally:
            lifecycle.stop(here.spec.slot)
    print(f"\nFixed prompts that differed: {differing}. Same sidecar: {'yes' if is_same else 'no'}.")
    return int(bool(differing) or not is_same)


def _prompts(here: Soak, count: int, every: int, fixed: Mapping[str, torch.Tensor], chances: random.Random) -> int:
    """Prints a row at the beginning and every so many prompts; returns how many fixed prompts differed."""
    print(f"| {' | '.join(HEAD)} |")
    print("|---" * len(HEAD) + "|")
    differing, began = 0, time.monotonic()
    _row(here, 0, 0.0)
    for number in range(1, count + 1):
        width, height = chances.choice(SIZES)
        layout = list(LAYOUTS)[number % len(LAYOUTS)]
        text, seed = chances.choice(TEXTS), chances.randrange(1 << 32)
        here.run(layout, PROMPT_STEPS, **{"3.text": text, "5.width": width, "5.height": height, "6.seed": seed})
        if number % every == 0:
            _row(here, number, (time.monotonic() - began) / every)
            differing += _differing(here, fixed)
            session.unload()
            began = time.monotonic()
    return differing


def _row(here: Soak, number: int, seconds: float) -> None:
    processes = here.processes()
    memory = [f"{process.memory_info().rss / MB:.0f}" for process in processes]
    cells = [str(number), *memory, str(processes[0].num_fds()), str(processes[0].num_threads()), f"{seconds:.2f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def _differing(here: Soak, fixed: Mapping[str, torch.Tensor]) -> int:
    return sum(not torch.equal(here.run(layout, PROMPT_STEPS), first) for layout, first in fixed.items())


def _cancels(here: Soak, count: int, chances: random.Random) -> None:
    taken: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for number in range(count):
        layout = list(LAYOUTS)[number % len(LAYOUTS)]
        seconds = here.cancel(layout, chances.randint(1, LATEST_STEP), chances.uniform(0.0, LATEST_S))
        taken[layout] += [] if seconds is None else [seconds]
    print("\n| layout | cancelled | median ms | p95 ms | largest ms |")
    print("|---" * 5 + "|")
    for layout, seconds in [*taken.items(), ("all", [each for group in taken.values() for each in group])]:
        print(f"| {layout} | {len(seconds)} | {' | '.join(_milliseconds(seconds))} |")


def _milliseconds(seconds: Sequence[float]) -> list[str]:
    if not seconds:
        return ["", "", ""]
    ordered = sorted(seconds)
    measures = (statistics.median(ordered), ordered[math.ceil(0.95 * len(ordered)) - 1], ordered[-1])
    return [f"{1e3 * each:.0f}" for each in measures]
