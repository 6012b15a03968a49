"""Judge the adapters with plain diffusers on held-out captions, with and without them, from the same noise.

    python -m tools.demo_model.evaluate_adapters chalk --sheet chalk.png
    python -m tools.demo_model.evaluate_adapters edges --sheet edges.png

`chalk`: the share of pictures that look like chalk on a board. `edges`: how the pictures' edges meet the edge maps that
the ControlNet was given, and the share of asked attributes. Prints Markdown; `drawn` is the truth through the VAE. The
sheet shows drawn truth, without, and with the adapter, one above the other.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_controlnet import FluxControlNetPipeline
from safetensors.torch import load_file

from .adapter_checks import chalk_verdicts, edge_agreement
from .evaluate import add_options, contact_sheet, held_out, load_pipeline, reconstruct, sample, shares
from .scenes import Scene, draw, edge_map
from .train_controlnet import CONTROLNET_TARGET
from .train_lora import DIFFUSERS_FILE, merge

SHEET_COLUMNS = 8


def chalk_shares(pictures: list[np.ndarray], scenes: list[Scene]) -> dict[str, float]:
    verdicts = [chalk_verdicts(picture) for picture in pictures]
    table = {name: float(np.mean([each[name] for each in verdicts])) for name in verdicts[0]}
    return {**table, "chalk": float(np.mean([all(each.values()) for each in verdicts]))}


def edge_shares(pictures: list[np.ndarray], scenes: list[Scene]) -> dict[str, float]:
    size = len(pictures[0])
    found = [
        edge_agreement(picture, edge_map(draw(scene, size))) for picture, scene in zip(pictures, scenes, strict=True)
    ]
    table = {name: float(np.mean([each[name] for each in found])) for name in found[0]}
    return {**table, "asked attributes": shares(pictures, scenes)["asked"]}


def with_controlnet(pipeline: FluxPipeline, folder: Path) -> FluxControlNetPipeline:
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    controlled = FluxControlNetPipeline(
        **{part: getattr(pipeline, part) for part in parts},
        controlnet=FluxControlNetModel.from_pretrained(folder, dtype=torch.float32),
    )
    controlled.set_progress_bar_config(disable=True)
    return controlled.to(pipeline.device)


def table(rows: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|" + "---|" * (1 + len(columns))]
    lines += [f"| {name} | " + " | ".join(f"{100 * row[c]:.1f}%" for c in columns) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("chalk", "edges"))
    add_options(parser, limit=48, size=128)
    options = parser.parse_args()
    trained = DIFFUSERS_FILE if options.what == "chalk" else CONTROLNET_TARGET
    if not trained.exists():
        raise SystemExit(f"{trained} is not there: train it first (see tools/demo_model/README.md)")
    pipeline = load_pipeline(options)
    scenes = held_out(options.limit, options.size)
    captions = [scene.caption() for scene in scenes]
    style = "chalk" if options.what == "chalk" else "picture"
    drawn = reconstruct(pipeline, [draw(scene, options.size, style) for scene in scenes], options.batch)
    without = sample(pipeline, captions, options)
    if options.what == "chalk":
        merge(pipeline.transformer, load_file(trained))
        adapted, judge = sample(pipeline, captions, options), chalk_shares
    else:
        edges = [edge_map(draw(scene, options.size)) for scene in scenes]
        adapted = sample(with_controlnet(pipeline, trained), captions, options, control=edges)
        judge = edge_shares
    pictures = {"drawn": drawn, "without": without, "with": adapted}
    print(table({name: judge(made, scenes) for name, made in pictures.items()}))
    if options.sheet is not None:
        shown = [picture for made in pictures.values() for picture in made[:SHEET_COLUMNS]]
        contact_sheet(shown, columns=min(SHEET_COLUMNS, len(scenes))).save(options.sheet)
        print("\n".join(captions[:SHEET_COLUMNS]))


if __name__ == "__main__":
    main()
