"""Draw training scenes and keep their latents: `python -m tools.demo_model.cache_latents` (resumes by itself).

On a machine with a GPU `--times 8` draws as many times more, on all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import multiprocessing

from . import checkpoint, machine
from .scenes import draw, label_map, make_scene
from .train_vae import load_trained, posterior_of, to_tensor

FOLDER = checkpoint.CACHE / "latents"
SEED = 5
SHARD = 1000
PLAN = {128: 24_000, 256: 6_000, 192: 3_000, 384: 1_000}
"""Pictures per size in px. Each size draws other scenes."""
OFFSET = {128: 0, 256: 1_000_000, 192: 2_000_000, 384: 3_000_000}


@dataclass
class Latents:
    """All cached pictures of one size: normalised latents `[N, 16, H, W]`, label shares `[N, S, L]`, captions."""

    size: int
    latents: torch.Tensor
    labels: torch.Tensor
    captions: list[str]


def shard_path(size: int, shard: int) -> Path:
    return FOLDER / f"{size}-{shard:03d}.safetensors"


@dataclass
class Drawn:
    """The pictures of one shard, uint8 `[N, H, W, 3]`, their label shares uint8 `[N, S, L]` and captions."""

    size: int
    shard: int
    pictures: torch.Tensor
    labels: torch.Tensor
    captions: list[str]


def draw_shard(job: tuple[int, int]) -> Drawn:
    """`job`: the size in px and the shard's number."""
    size, shard = job
    scenes = [make_scene(SEED, OFFSET[size] + shard * SHARD + i, canvas=size) for i in range(SHARD)]
    labels = np.stack([label_map(scene, size // 16) for scene in scenes]) * 255 + 0.5
    return Drawn(
        size,
        shard,
        torch.from_numpy(np.stack([draw(scene, size) for scene in scenes])),
        torch.from_numpy(labels.astype(np.uint8)).flatten(1, 2).contiguous(),
        [scene.caption() for scene in scenes],
    )


def drawn_by(workers: int, jobs: list[tuple[int, int]]) -> Iterator[Drawn]:
    """The shards in any order; `workers` processes draw, or for one this process."""
    if workers == 1:
        yield from map(draw_shard, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap_unordered(draw_shard, jobs)


@torch.no_grad()
def keep_latents(vae: AutoencoderKL, drawn: Drawn) -> None:
    batch = max(1, 32 * machine.BATCH_SCALE[vae.device.type] * 128 * 128 // drawn.size**2)
    latents = [posterior_of(vae, to_tensor(part.to(vae.device))).mean for part in drawn.pictures.split(batch)]
    normal = (torch.cat(latents) - vae.config["shift_factor"]) * vae.config["scaling_factor"]
    path = shard_path(drawn.size, drawn.shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    tensors = {"latents": normal.half().cpu().contiguous(), "labels": drawn.labels}
    save_file(tensors, partial, metadata={"captions": json.dumps(drawn.captions)})
    partial.rename(path)


def load_latents(size: int) -> Latents:
    """Every shard of one size that is there."""
    latents, labels, captions = [], [], []
    for path in sorted(FOLDER.glob(f"{size}-*.safetensors")):
        tensors = load_file(path)
        latents.append(tensors["latents"])
        labels.append(tensors["labels"])
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        captions += json.loads(header["__metadata__"]["captions"])
    if not captions:
        raise SystemExit(f"no cached latents of {size} px: run python -m tools.demo_model.cache_latents first")
    return Latents(size, torch.cat(latents), torch.cat(labels), captions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    machine.add_options(parser)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(PLAN))
    parser.add_argument("--times", type=int, default=1, help="so many times the pictures")
    parser.add_argument("--workers", type=int, help="processes that draw (default: one, or with a GPU all cores)")
    options = parser.parse_args()
    device = machine.prepare(options)
    workers = options.workers or (1 if device.type == "cpu" else os.cpu_count() or 1)
    vae = load_trained(device=device)
    cast(Any, vae).to(memory_format=torch.channels_last)
    started = time.monotonic()
    jobs = [(size, shard) for size in options.sizes for shard in range(options.times * PLAN[size] // SHARD)]
    missing = sorted((job for job in jobs if not shard_path(*job).exists()), key=lambda job: job[1])
    for count, drawn in enumerate(drawn_by(workers, missing), 1):
        keep_latents(vae, drawn)
        print(f"{count} of {len(missing)} shards: {drawn.size} px, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
