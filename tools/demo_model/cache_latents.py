"""Draw training scenes and keep their latents: `python -m tools.demo_model.cache_latents` (resumes by itself)."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from . import checkpoint
from .scenes import draw, label_map, make_scene
from .train_vae import load_trained, to_tensor

FOLDER = checkpoint.CACHE / "latents"
SEED = 5
SHARD = 1000
PLAN = {128: 24_000, 256: 3_000, 192: 3_000, 384: 1_000}
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


@torch.no_grad()
def make_shard(vae, size: int, shard: int) -> None:
    scenes = [make_scene(SEED, OFFSET[size] + shard * SHARD + i, canvas=size) for i in range(SHARD)]
    batch = max(1, 32 * 128 * 128 // (size * size))
    latents = [
        vae.encode(to_tensor([draw(scene, size) for scene in scenes[s : s + batch]])).latent_dist.mean
        for s in range(0, SHARD, batch)
    ]
    labels = np.stack([label_map(scene, size // 16) for scene in scenes]) * 255 + 0.5
    normal = (torch.cat(latents) - vae.config.shift_factor) * vae.config.scaling_factor
    tensors = {
        "latents": normal.half().contiguous(),
        "labels": torch.from_numpy(labels.astype(np.uint8)).flatten(1, 2).contiguous(),
    }
    path = shard_path(size, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"captions": json.dumps([scene.caption() for scene in scenes])})
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
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(PLAN))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    vae = load_trained().to(memory_format=torch.channels_last)
    started = time.monotonic()
    for size in options.sizes:
        for shard in range(PLAN[size] // SHARD):
            if not shard_path(size, shard).exists():
                make_shard(vae, size, shard)
                print(f"{size} px: {(shard + 1) * SHARD} pictures, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
