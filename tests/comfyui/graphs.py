"""Workflows in API format for the tests that queue prompts, and what becomes of them."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import numpy as np
from paralleldit.tests.comfyui.host import PACK, Host, Run
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

NAME = "diffusers/tiny"
STEPS = 4


def demo_with(pipeline: str, **sampler: Any) -> dict[str, Any]:
    api = json.loads((PACK / "workflows" / "api" / "demo_txt2img.api.json").read_text())
    for key, name in (("2", "model"), ("3", "text_encoders"), ("4", "text_encoders"), ("7", "vae")):
        api[key]["inputs"][name] = pipeline
    api["5"]["inputs"] |= {"width": 128, "height": 96}
    api["6"]["inputs"] |= {"steps": STEPS, **sampler}
    return api


def stock(**changes: Any) -> dict[str, Any]:
    """KSampler in the place of Parallel Sampler."""
    links = {"model": ["2", 0], "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0]}
    settings = {"seed": 0, "steps": STEPS, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {"class_type": "KSampler", "inputs": links | settings | changes}


def change(graph: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put nodes (`"20"`) and inputs of nodes (`"6.model"`) into a workflow."""
    for place, value in copy.deepcopy(changes).items():
        key, _, name = place.partition(".")
        if name:
            graph[key]["inputs"][name] = value
        else:
            graph[key] = value


def latent(host: Host, api: dict[str, Any], name: str) -> Tensor:
    """What node 6 of a workflow gives, `[B, C, H, W]`, saved as `name`. The run must not fail."""
    api["9"] = {"class_type": "SaveLatent", "inputs": {"samples": ["6", 0], "filename_prefix": name}}
    run = host.run(api)
    assert not run.error, run.error
    return load_file(host.base / "output" / f"{name}_00001_.latent")["latent_tensor"]


def picture(host: Host, run: Run, file: dict[str, str] | None = None) -> np.ndarray:
    """The first picture of a run, or `file` of it: `[H, W, 3]`."""
    assert not run.error, run.error
    with Image.open(io.BytesIO(host.view(file or run.pictures()[0]))) as image:
        return np.array(image)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = float(((one.astype(float) - other.astype(float)) ** 2).mean())
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)
