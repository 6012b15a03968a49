"""ComfyUI's own templates with Parallel Loader in the place of Load Diffusion Model: the latents that they give anyway.

The models are tiny, of random weights in the published layout of their files; text encoders and VAEs are stand-ins.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from paralleldit.parallel_backend.families.registry import FAMILIES
from paralleldit.parallel_backend.files import detect, open_checkpoint
from paralleldit.tests import tiny_qwen_image, tiny_zimage
from paralleldit.tests.comfyui.templates import Api, find_template, load, to_api
from paralleldit.tests.unit.cross_attention_original_layout import original_weights
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a checkout of ComfyUI"),
]

TOLERANCE = 1e-4
SIDE = 96
SCALED = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
"""ComfyUI's mark of a layer in fp8 with a factor."""
LORAS_ON = {"PrimitiveBoolean.value": True}
"""The switch by which templates turn on their LoRA of few steps, and its steps and cfg."""


@dataclass(frozen=True)
class Case:
    """`kind`: ComfyUI's class of the model. `changes`: inputs of all nodes of a class."""

    kind: str
    steps: int = 2
    changes: dict[str, Any] = field(default_factory=dict)


CASES = {
    "image_z_image_turbo": Case("ZImage"),
    "image_z_image": Case("ZImage"),
    "image_qwen_image": Case("QwenImage"),
    "image_qwen_image, its LoRA": Case("QwenImage", changes=LORAS_ON),
    "image_qwen_image_2512_with_2steps_lora": Case("QwenImage"),
    "image_qwen_image_edit": Case("QwenImage"),
    "image_qwen_image_edit_2509": Case("QwenImage"),
}


def write_model(file: Path) -> None:
    """What a template calls its model, whose name says which and in which format; beside it the same numbers in fp32.

    All but the matrices are fp32, so that the ranks compute in it.
    """
    if file.exists():
        return
    if "qwen" in file.name:
        weights = tiny_qwen_image.single_file(tiny_qwen_image.tiny_transformer(edits="2511" in file.name))
    else:
        weights = original_weights(dict(tiny_zimage.tiny_transformer().state_dict()))
    stored, decoded = {}, {}
    for key, weight in weights.items():
        stored[key] = weight
        if weight.ndim == 2 and "fp8" in file.name:
            scale = weight.abs().max() / 448 if "mixed" in file.name else torch.tensor(1.0)
            stored[key] = (weight / scale).to(torch.float8_e4m3fn)
            if "mixed" in file.name:
                stored |= {f"{key}_scale": scale, key.removesuffix("weight") + "comfy_quant": SCALED.clone()}
            weight = stored[key].float() * scale
        decoded[key] = weight
    for path, tensors in ((file, stored), (in_fp32(file), decoded)):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def in_fp32(file: Path) -> Path:
    return file.with_stem(f"{file.stem} in fp32")


def write_lora(file: Path) -> None:
    """In the layout of Qwen-Image Lightning: the model's own names without a prefix."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for key, weight in tiny_qwen_image.tiny_transformer().state_dict().items():
        module = key.removesuffix(".weight")
        if key.startswith("transformer_blocks.") and weight.ndim == 2:
            rows, columns = weight.shape
            tensors[f"{module}.lora_up.weight"] = torch.randn(rows, 4) * 0.1
            tensors[f"{module}.lora_down.weight"] = torch.randn(4, columns) * 0.1
            tensors[f"{module}.alpha"] = torch.tensor(4.0)
    save_file(tensors, file)


def prepared(api: Api, case: Case, base: Path) -> Api:
    """A template of small size, with the files that it names written, and stand-ins for encoders and VAE."""
    width = tiny_zimage.TEXT_WIDTH if case.kind == "ZImage" else tiny_qwen_image.TEXT_WIDTH
    folder = "zimage" if case.kind == "ZImage" else "qwen"
    api = copy.deepcopy(api)
    (base / "models" / "loras").mkdir(parents=True, exist_ok=True)
    (base / "input").mkdir(exist_ok=True)
    Image.effect_noise((SIDE, SIDE), 64).convert("RGB").save(base / "input" / "noise.png")
    for node in api.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "CLIPLoader":
            node |= {"class_type": "TinyClip", "inputs": {"width": width}}
        elif kind == "VAELoader":
            vae = {"vae": f"diffusers/{folder}", "weight_dtype": "auto"}
            node |= {"class_type": "ParallelDiTVAELoader", "inputs": vae}
        elif kind == "UNETLoader":
            write_model(base / "models" / "diffusion_models" / inputs["unet_name"])
        elif kind == "LoraLoaderModelOnly":
            write_lora(base / "models" / "loras" / inputs["lora_name"])
        elif kind == "EmptySD3LatentImage":
            inputs |= {"width": SIDE + 32, "height": SIDE}
        elif kind == "LoadImage":
            inputs["image"] = "noise.png"
        elif kind in ("FluxKontextImageScale", "ImageScaleToTotalPixels"):
            size = {"width": SIDE, "height": SIDE, "upscale_method": "area", "crop": "disabled"}
            node |= {"class_type": "ImageScale", "inputs": {"image": inputs["image"], **size}}
        elif kind == "TextEncodeQwenImageEditPlus":
            inputs.pop("image2", None)  # each picture is 4096 tokens
        elif kind == "SaveImageAdvanced":
            node["class_type"] = "SaveImage"
        elif kind == "KSampler":
            inputs |= {"steps": case.steps, "seed": 7}
        for place, value in case.changes.items():
            of, name = place.split(".")
            if of == kind:
                inputs[name] = value
    return api


def swapped(api: Api, base: Path, sampler: str) -> Api:
    """The loader replaced: by Parallel Loader for a `sampler`, with Parallel Sampler the LoRA's too. Without one by
    that of the tests, since ComfyUI's own takes such files for models of full width."""
    api = copy.deepcopy(api)
    for node in api.values():
        if node["class_type"] == "KSampler":
            node["class_type"] = sampler or "KSampler"
        if node["class_type"] == "LoraLoaderModelOnly" and sampler == "ParallelDiTSampler":
            lora = node["inputs"]
            inputs = {"model": lora["model"], "lora": lora["lora_name"], "strength": lora["strength_model"]}
            node |= {"class_type": "ParallelDiTLora", "inputs": inputs}
        if node["class_type"] != "UNETLoader":
            continue
        name = node["inputs"]["unet_name"]
        if sampler:
            node |= {"class_type": "ParallelDiTLoader", "inputs": {"model": name, "weight_dtype": "auto"}}
        else:
            node |= {"class_type": "NativeFileLoader", "inputs": native_inputs(base, name)}
    return api


def native_inputs(base: Path, name: str) -> dict[str, str]:
    file = in_fp32(base / "models" / "diffusion_models" / name)
    found = detect(open_checkpoint(file))
    spec = FAMILIES[found.family]
    assert spec.host_config
    return {"file": file.name, "config": json.dumps(spec.host_config(found.config)), "kind": spec.host_class or ""}


@pytest.fixture(scope="module")
def known(host) -> Iterator[Any]:
    return host.get("/object_info")


@pytest.mark.parametrize("name", CASES)
def test_a_template_gives_the_latent_that_it_gives_with_comfyuis_own_loader(host, known, name):
    case, template = CASES[name], name.partition(",")[0]
    path = find_template(os.environ.get("COMFYUI_PYTHON", sys.executable), template)
    source = (Path(os.environ["COMFYUI_PATH"]) / "comfy" / "supported_models.py").read_text()
    if path is None or f"class {case.kind}(" not in source:
        pytest.skip("this ComfyUI is older than the template or the model")
    try:
        api = prepared(to_api(load(path), known), case, host.base)
    except LookupError as error:
        pytest.skip(f"this ComfyUI has no node {error}")
    native = latent(host, swapped(api, host.base, ""), f"{name} native")
    for sampler in ("KSampler", "ParallelDiTSampler"):
        found = latent(host, swapped(api, host.base, sampler), f"{name} {sampler}")
        error = float((found - native).norm() / native.norm())
        print(f"| {name} | {sampler} | {error:.1e} |")
        assert found.shape == native.shape
        assert error <= TOLERANCE, sampler
    assert "lora key not loaded" not in host.log.read_text(errors="replace")


def latent(host: Any, api: Api, name: str) -> Tensor:
    """What the template's sampler gives; of a template that samples twice, the last one."""
    key = next(key for key, node in api.items() if node["class_type"] in ("KSampler", "ParallelDiTSampler"))
    api["saved"] = {"class_type": "SaveLatent", "inputs": {"samples": [key, 0], "filename_prefix": name}}
    run = host.run(api)
    assert not run.error, run.error
    return load_file(host.base / "output" / f"{name}_00001_.latent")["latent_tensor"]
