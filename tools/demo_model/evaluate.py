"""Judge the model with plain diffusers on held-out captions: `python -m tools.demo_model.evaluate --sheet sheet.png`.

The exported weights, or with `--newest` those of the training's last save. `--truth` judges the checker and the VAE
instead: the same scenes as drawn, then through the VAE and back.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from PIL import Image

from . import machine
from .checker import FOUR, check
from .checkpoint import TARGET
from .export import load_averaged, pipeline_of
from .scenes import Scene, draw, make_scene
from .train_vae import decoded, posterior_of, to_pictures, to_tensor

SEED = 99
SHEET_PICTURES = 24


def held_out(count: int, size: int) -> list[Scene]:
    """The first `count` of the scenes of `size` px that every judgement is about."""
    return [make_scene(SEED, index, held_out=True, canvas=size) for index in range(count)]


def load_pipeline(options: argparse.Namespace) -> FluxPipeline:
    """The stock pipeline, fp32, of the exported or of the newest averaged weights, on the device of `options`."""
    device = machine.prepare(options)
    if options.newest:
        pipeline = pipeline_of(load_averaged())
    else:
        pipeline = FluxPipeline.from_pretrained(options.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def sample(
    pipeline: Any, captions: list[str], options: argparse.Namespace, control: list[np.ndarray] | None = None
) -> list[np.ndarray]:
    """One picture uint8 `[H, W, 3]` per caption; number i starts from the noise of seed + i.

    `control`: the pictures of a ControlNet's condition, uint8 `[H, W, 3]`.
    """
    pictures: list[np.ndarray] = []
    started = time.monotonic()
    for first in range(0, len(captions), options.batch):
        batch = captions[first : first + options.batch]
        given: dict[str, Any] = {}
        if control is not None:
            given["control_image"] = [Image.fromarray(each) for each in control[first : first + options.batch]]
        made = pipeline(
            prompt=batch,
            negative_prompt=[""] * len(batch),
            true_cfg_scale=options.guidance,
            num_inference_steps=options.steps,
            height=options.size,
            width=options.size,
            max_sequence_length=pipeline.tokenizer_2.model_max_length,
            generator=[torch.Generator().manual_seed(options.seed + first + i) for i in range(len(batch))],
            output_type="np",
            **given,
        )
        pictures += list((made.images * 255 + 0.5).astype(np.uint8))
        print(f"{len(pictures)} pictures, {time.monotonic() - started:.0f} s", flush=True)
    return pictures


@torch.no_grad()
def reconstruct(pipeline: FluxPipeline, pictures: list[np.ndarray], batch: int) -> list[np.ndarray]:
    """The pictures through the VAE and back."""
    made: list[np.ndarray] = []
    for first in range(0, len(pictures), batch):
        part = to_tensor(pictures[first : first + batch]).to(pipeline.device)
        made += list(to_pictures(decoded(pipeline.vae, posterior_of(pipeline.vae, part).mean)))
    return made


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
    """The pictures row by row; what is missing of the last row is white."""
    missing = -len(pictures) % columns
    cells = pictures + [np.full_like(pictures[0], 255)] * missing
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    return Image.fromarray(np.concatenate(rows, axis=0))


def report(name: str, table: dict[str, float]) -> None:
    print(name + ": " + ", ".join(f"{key} {100 * value:.1f}%" for key, value in table.items()), flush=True)


def add_options(parser: argparse.ArgumentParser, limit: int, size: int) -> None:
    """What is judged and how it is sampled."""
    add = parser.add_argument
    add("--model", type=Path, default=TARGET, help="diffusers folder (default: the exported model)")
    add("--newest", action="store_true", help="the newest averaged weights of the training instead")
    add("--limit", type=int, default=limit, help=f"how many held-out captions (default {limit})")
    add("--size", type=int, default=size)
    add("--steps", type=int, default=20)
    add("--guidance", type=float, default=5.0)
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=8)
    add("--sheet", type=Path, help="write a contact sheet here")
    machine.add_options(parser)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, limit=200, size=256)
    parser.add_argument("--truth", action="store_true")
    parser.add_argument("--json", type=Path, help="write the table here")
    options = parser.parse_args()
    pipeline = load_pipeline(options)
    scenes = held_out(options.limit, options.size)
    if options.truth:
        drawn = [draw(scene, options.size) for scene in scenes]
        report("drawn", shares(drawn, scenes))
        pictures = reconstruct(pipeline, drawn, options.batch)
    else:
        pictures = sample(pipeline, [scene.caption() for scene in scenes], options)
    table = shares(pictures, scenes)
    report("through the VAE" if options.truth else "sampled", table)
    if options.sheet is not None:
        contact_sheet(pictures[:SHEET_PICTURES]).save(options.sheet)
        for scene in scenes[:SHEET_PICTURES]:
            print(scene.caption())
    if options.json is not None:
        settings = {key: getattr(options, key) for key in ("limit", "size", "steps", "guidance", "seed", "truth")}
        options.json.write_text(json.dumps({**settings, "shares": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
