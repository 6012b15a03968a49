"""Judge the exported model with plain diffusers on held-out captions: `python -m tools.demo_model.evaluate`.

`--truth` judges the checker itself instead: the same scenes as drawn, then through the VAE and back.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from .checker import FOUR, check
from .checkpoint import TARGET
from .scenes import Scene, draw, make_scene
from .train_vae import to_pictures, to_tensor

SEED = 99
BATCH = 10
SHEET_PICTURES = 24


def sample(pipeline: FluxPipeline, captions: list[str], options: argparse.Namespace) -> np.ndarray:
    """Pictures uint8 `[B, H, W, 3]` of one batch of captions."""
    made = pipeline(
        prompt=captions,
        negative_prompt=[""] * len(captions),
        true_cfg_scale=options.guidance,
        num_inference_steps=options.steps,
        height=options.size,
        width=options.size,
        max_sequence_length=pipeline.tokenizer_2.model_max_length,
        generator=[torch.Generator().manual_seed(options.seed + i) for i in range(len(captions))],
        output_type="np",
    )
    return (made.images * 255 + 0.5).astype(np.uint8)


@torch.no_grad()
def reconstruct(pipeline: FluxPipeline, pictures: list[np.ndarray]) -> list[np.ndarray]:
    decoded = pipeline.vae.decode(pipeline.vae.encode(to_tensor(pictures)).latent_dist.mean).sample
    return list(to_pictures(decoded))


def shares(pictures: list[np.ndarray], scenes: list[Scene]) -> dict[str, float]:
    """Per attribute, the share that the pictures show; `asked` is over colour, shape, count and relation."""
    right, asked = Counter(), Counter()
    for picture, scene in zip(pictures, scenes, strict=True):
        for name, verdicts in check(picture, scene).items():
            right[name] += sum(verdicts)
            asked[name] += len(verdicts)
    table = {name: right[name] / asked[name] for name in sorted(asked)}
    table["asked"] = sum(right[name] for name in FOUR) / sum(asked[name] for name in FOUR)
    return table


def contact_sheet(pictures: list[np.ndarray], columns: int = 6) -> Image.Image:
    rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures) - columns + 1, columns)]
    return Image.fromarray(np.concatenate(rows, axis=0))


def report(name: str, table: dict[str, float]) -> None:
    print(name + ": " + ", ".join(f"{key} {100 * value:.1f}%" for key, value in table.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TARGET)
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--truth", action="store_true")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet here")
    parser.add_argument("--json", type=Path, help="write the table here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline = FluxPipeline.from_pretrained(options.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scenes = [make_scene(SEED, index, held_out=True) for index in range(options.captions)]
    drawn = [draw(scene, options.size) for scene in scenes]
    if options.truth:
        report("drawn", shares(drawn, scenes))
    pictures: list[np.ndarray] = []
    started = time.monotonic()
    for first in range(0, len(scenes), BATCH):
        batch = scenes[first : first + BATCH]
        if options.truth:
            pictures += reconstruct(pipeline, drawn[first : first + BATCH])
        else:
            pictures += list(sample(pipeline, [scene.caption() for scene in batch], options))
            print(f"{len(pictures)} pictures, {time.monotonic() - started:.0f} s", flush=True)
    table = shares(pictures, scenes)
    report("through the VAE" if options.truth else "sampled", table)
    if options.sheet is not None:
        contact_sheet(pictures[:SHEET_PICTURES]).save(options.sheet)
        for scene in scenes[:SHEET_PICTURES]:
            print(scene.caption())
    if options.json is not None:
        settings = {key: getattr(options, key) for key in ("captions", "size", "steps", "guidance", "seed", "truth")}
        options.json.write_text(json.dumps({**settings, "shares": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
