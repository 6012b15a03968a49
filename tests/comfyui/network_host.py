"""Predicts with ComfyUI's own networks: run by `test_network_parity.py` with the host's Python.

COMFYUI_PATH=... python network_host.py FOLDER

For each FOLDER/NAME.json (`family` and `config` of the loader's handle) that this ComfyUI is not too old for reads the
weights NAME.safetensors and writes what its MODEL predicts, NAME.host.safetensors.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BATCH = 2
OTHERWISE = {"cogvideox": {"spatial_interpolation_scale": 1.0}}
"""Of the config of ComfyUI's network: in its own scale of CogVideoX 1.0's positions no model was trained."""


def timestep(family: str) -> float:
    """That of the prediction; Z-Image, Qwen-Image and Mochi are given the noise level itself."""
    return 0.5 if family in ("zimage", "qwen-image", "mochi") else 500.0


def inputs(family: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """A noisy latent, and a prompt's tokens and entry."""
    generator = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    latent = draw(BATCH, 4, 72, 56)
    if family == "wan":
        # Of odd sides.
        return draw(BATCH, 16, 3, 9, 7), draw(BATCH, 9, 20), {}
    if family == "mochi":
        # Its patches are whole in ComfyUI, and its masks those of one prompt.
        mask = (torch.arange(9) < 6).long().view(1, 9)
        return draw(BATCH, 12, 3, 8, 6), draw(1, 9, 16), {"attention_mask": mask}
    if family == "hunyuanvideo":
        # Its patches are whole in ComfyUI.
        return draw(BATCH, 16, 3, 8, 6), draw(BATCH, 9, 24), {"pooled_output": draw(BATCH, 12), "guidance": 4.5}
    if family.startswith("cogvideox"):
        # Of odd sides and frames, but for 1.0, whose positions are those of ComfyUI in the size of the training alone.
        size = (3, 9, 7) if family.endswith("1.5") else (1, 60, 90)
        return draw(BATCH, 16, *size), draw(BATCH, 9, 20), {}
    if family == "zimage":
        return draw(BATCH, 16, 9, 7), draw(BATCH, 9, 20), {}
    if family == "qwen-image":
        references = [draw(1, 16, 1, 6, 10), draw(1, 16, 1, 12, 5)]
        return draw(BATCH, 16, 1, 9, 7), draw(BATCH, 9, 24), {"reference_latents": references}
    if family in ("sdxl", "sdxl-refiner"):
        told = {"width": 640, "height": 480, "crop_w": 16, "crop_h": 8}
        told |= {"aesthetic_score": 4.5} if family == "sdxl-refiner" else {"target_width": 512, "target_height": 384}
        return draw(BATCH, 4, 9, 7), draw(BATCH, 9, 24), told | {"pooled_output": draw(BATCH, 12)}
    if family != "hunyuandit":
        return latent, draw(BATCH, 9, 20), {"width": 640, "height": 480}
    masks = {"attention_mask": torch.arange(6) < 4, "attention_mask_mt5xl": torch.arange(9) < 5}
    entry = {"conditioning_mt5xl": draw(BATCH, 9, 40), "width": 640, "height": 480}
    # Both texts are longer than what the model was trained with.
    return latent, draw(BATCH, 6, 24), entry | {name: mask.long().repeat(BATCH, 1) for name, mask in masks.items()}


def main(folder: Path) -> None:
    sys.argv[1:] = ["--cpu"]
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "conftest.py"))
    import comfy.options

    comfy.options.enable_args_parsing()
    from paralleldit.nodes.comfyui.remote_model import host_knows, model_config, unet_config
    from paralleldit.parallel_backend.families.registry import FAMILIES

    for told in sorted(folder.glob("*.json")):
        handle = json.loads(told.read_text())
        spec = FAMILIES[handle["family"]]
        if not host_knows(spec) or unet_config(spec, handle["config"]) != spec.host_config(handle["config"]):
            continue
        config = model_config(spec, handle["config"])
        config.unet_config |= OTHERWISE.get(spec.name, {})
        config.set_inference_dtype(torch.float32, None)
        weights = load_file(told.with_suffix(".safetensors"))
        model = config.get_model(weights, "")
        model.load_model_weights(weights, "")
        latent, tokens, entry = inputs(spec.name)
        conditions = model.extra_conds(noise=latent, device="cpu", cross_attn=tokens, **entry)
        inner = {name: value.process_cond(batch_size=BATCH, device="cpu").cond for name, value in conditions.items()}
        sigma = model.model_sampling.sigma(torch.tensor(timestep(spec.name))).repeat(BATCH)
        if spec.name.startswith("cogvideox"):
            # Its kind of sampling is for latents that have been scaled already.
            latent = latent / (sigma.view(-1, 1, 1, 1, 1) ** 2 + 1) ** 0.5
        with torch.inference_mode():
            denoised = model.apply_model(latent, sigma, **inner)
        save_file({"sigma": sigma, "denoised": denoised.contiguous()}, told.with_suffix(".host.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
