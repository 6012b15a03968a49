"""The same workflow gives the same latent: natively, with stock KSampler on our MODEL, and with Parallel Sampler.

`COMFYUI_PATH` names a checkout of ComfyUI, `COMFYUI_PYTHON` a Python that has its requirements (by default this one).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from paralleldit.parallel_backend.families.keys.sdxl import V_PREDICTION, ZERO_TERMINAL
from paralleldit.parallel_backend.sampling.names import SAMPLER_NAMES, SCHEDULER_NAMES
from paralleldit.parallel_backend.weights.load import load_transformer
from paralleldit.tests import tiny_qwen_image, tiny_sd3, tiny_unet, tiny_zimage
from paralleldit.tests.comfyui import parity_host as host
from paralleldit.tests.comfyui.tiny_networks import hunyuandit, pixart
from paralleldit.tests.unit import cross_attention_original_layout, flux_original_layout
from safetensors.torch import save_file

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a checkout of ComfyUI"),
]

TOLERANCE = 1e-4
OF_FP16 = 2e-3
"""The tolerance where the results are rounded to fp16, of which a unit is 1e-3."""


def flux() -> tuple[Any, Callable[[Any], Any]]:
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=24,
        pooled_projection_dim=40,
        guidance_embeds=True,
        axes_dims_rope=flux_original_layout.rotary_axes(32),
    )
    return model, flux_original_layout.original_layout


def sd3() -> tuple[Any, Callable[[Any], Any]]:
    model = SD3Transformer2DModel(
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=128,
        pooled_projection_dim=40,
        pos_embed_max_size=9,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return model, tiny_sd3.original_layout


def of_cross_attention(model: Any) -> tuple[Any, Callable[[Any], Any]]:
    return model, cross_attention_original_layout.original_weights


def zimage() -> tuple[Any, Callable[[Any], Any]]:
    return of_cross_attention(tiny_zimage.tiny_transformer())


def qwen_image(edits: bool) -> tuple[Any, Callable[[Any], Any]]:
    model = tiny_qwen_image.tiny_transformer(edits)
    return model, lambda _: tiny_qwen_image.single_file(model)


def unet(model: str = tiny_unet.BASE, marks: tuple[str, ...] = ()) -> tuple[Any, Callable[[Any], Any]]:
    beside = dict.fromkeys(marks, torch.empty(0))
    return tiny_unet.of_files(model), lambda weights: tiny_unet.original_weights(weights) | beside


BUILDERS = {
    "flux": flux,
    "sd3": sd3,
    "pixart": lambda: of_cross_attention(pixart(takes_size=True)),
    "hunyuandit": lambda: of_cross_attention(hunyuandit(takes_size=True)),
    "zimage": zimage,
    "qwen-image": lambda: qwen_image(edits=False),
    "qwen-image edit": lambda: qwen_image(edits=True),
    "sdxl": unet,
    "sdxl v": lambda: unet(marks=(V_PREDICTION, ZERO_TERMINAL)),
    "sdxl refiner": lambda: unet(tiny_unet.REFINER),
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("parity")
    torch.manual_seed(0)
    for name, build in BUILDERS.items():
        model, original = build()
        if name not in host.ON_TWO:
            for key, parameter in model.named_parameters():
                torch.nn.init.normal_(parameter, mean=float(".norm_" in key), std=0.1)
        file = folder / f"{name}.safetensors"
        tables = {"pos_embed": torch.zeros(1, 32 * 32, 96)} if name == "pixart" else {}
        save_file(original(dict(model.state_dict())) | tables, file)
        loaded = load_transformer(file, device="cpu")
        pipeline = folder / host.scaled_folder(name)
        model.save_pretrained(pipeline / "transformer")
        vae = pipeline / "vae" / "config.json"
        vae.parent.mkdir()
        vae.write_text(json.dumps(host.vae_scale(host.MODELS[name][0])))
        file.with_suffix(".json").write_text(json.dumps({"family": loaded.family, "config": loaded.config}))
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    command = [python, "-W", "ignore", str(Path(host.__file__)), str(folder), *map(str, host.RANKS)]
    env = os.environ | {"PYTHONPATH": str(Path(host.__file__).parent / "shim"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, env=env)
    assert done.returncode == 0, f"ComfyUI's side failed:\n{done.stderr[-5000:]}"
    errors = json.loads((folder / "errors.json").read_text())
    print("\n".join(table(errors)))
    return errors


def table(errors: dict[str, list[float]]) -> list[str]:
    """For docs/MEASURED.md: the largest error of each case over all numbers of ranks, samplers and schedulers."""
    swept = {f"{name} {scheduler} [1]" for name in SAMPLER_NAMES for scheduler in SCHEDULER_NAMES}
    rows: dict[str, list[list[float]]] = {}
    for case, found in errors.items():
        rows.setdefault("sd3, every sampler and scheduler" if case in swept else case.split(" [")[0], []).append(found)
    lines = ["| Case | KSampler | Parallel Sampler |", "|---|---|---|"]
    for name, each in rows.items():
        largest = [f"{max(errors):.1e}" for errors in zip(*each, strict=True)]
        lines.append(f"| {name} | {' | '.join([*largest, *[''] * (2 - len(largest))])} |")
    return lines


@pytest.mark.parametrize("name", [f"{name} [{ranks}]" for name, case in host.CASES.items() for ranks in case.ranks])
def test_latents_equal_native(errors, name):
    if name not in errors:
        pytest.skip("this ComfyUI is older than the model")
    told = [f"{error:.1e}" for error in errors[name]]
    assert max(errors[name]) <= (OF_FP16 if "fp16" in name else TOLERANCE), f"KSampler and Parallel Sampler: {told}"


@pytest.mark.parametrize("sampler_name", SAMPLER_NAMES)
def test_every_sampler_and_scheduler_equals_native(errors, sampler_name):
    if f"{sampler_name} {SCHEDULER_NAMES[0]} [1]" not in errors:
        pytest.skip(f"this ComfyUI has no sampler {sampler_name}")
    for scheduler in SCHEDULER_NAMES:
        stock, sampler = errors[f"{sampler_name} {scheduler} [1]"]
        assert max(stock, sampler) <= TOLERANCE, f"{scheduler}: KSampler {stock:.1e}, Parallel Sampler {sampler:.1e}"
