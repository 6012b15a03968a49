"""What the ranks sample in a real ComfyUI's queue, and what ComfyUI itself samples: the same latents."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from paralleldit.parallel_backend.families.keys.cogvideox import COGVIDEOX15
from paralleldit.parallel_backend.families.keys.zimage import ZIMAGE
from paralleldit.parallel_backend.families.spec import FamilySpec
from paralleldit.parallel_backend.files import detect, open_checkpoint
from paralleldit.tests.comfyui.graphs import NAME, STEPS, change, demo_with, latent, stock

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a checkout of ComfyUI"),
]


@dataclass(frozen=True)
class Case:
    """One run of ComfyUI and of the ranks; `nodes` are added to the graph, `links` set inputs of the sampler.

    `file`: the transformer, in a file that ComfyUI loads by itself, instead of the pipeline's. `spec`: of a family of
    which ComfyUI loads tiny models only where it is given their config.
    """

    pipeline: str = "tiny"
    file: str = ""
    sampler: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    nodes: dict[str, Any] = field(default_factory=dict)
    links: dict[str, Any] = field(default_factory=dict)
    spec: FamilySpec | None = None


MASKED = {
    "20": {"class_type": "EmptyImage", "inputs": {"width": 128, "height": 96, "batch_size": 1, "color": 0x20C040}},
    "21": {"class_type": "VAEEncode", "inputs": {"pixels": ["20", 0], "vae": ["7", 0]}},
    "22": {"class_type": "SolidMask", "inputs": {"value": 0.7, "width": 128, "height": 96}},
    "23": {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["21", 0], "mask": ["22", 0]}},
}
SHIFTED = {
    "20": {
        "class_type": "ModelSamplingFlux",
        "inputs": {"max_shift": 1.4, "base_shift": 0.5, "width": 512, "height": 768},
    }
}
ODD = {"20": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 80, "height": 112, "batch_size": 1}}}
SD3_SHIFTED = {"20": {"class_type": "ModelSamplingSD3", "inputs": {"shift": 1.7}}}
VIDEO = {
    "5": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 48, "height": 64, "length": 9, "batch_size": 1}}
}
FRAME_MASKED = VIDEO | {
    "22": {"class_type": "SolidMask", "inputs": {"value": 0.7, "width": 48, "height": 64}},
    "23": {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["5", 0], "mask": ["22", 0]}},
}
CASES = {
    "flow": Case(),
    "guided": Case("guided", sampler={"cfg": 1.0, "sampler_name": "dpmpp_2m"}, batch=2),
    "guided with cfg": Case("guided", sampler={"cfg": 2.0, "sampler_name": "uni_pc", "scheduler": "beta"}),
    "picture to picture, masked": Case(
        "guided", "", {"denoise": 0.6, "seed": 2**64 - 1}, 1, MASKED, {"latent_image": ["23", 0]}
    ),
    "noise": Case("guided", sampler={"sampler_name": "dpmpp_2m_sde", "scheduler": "sgm_uniform"}),
    "shift": Case("guided", "", {"sampler_name": "dpmpp_sde"}, 1, SHIFTED, {"model": ["20", 0]}),
    "odd size": Case("tiny", sampler={"sampler_name": "dpm_2"}, nodes=ODD, links={"latent_image": ["20", 0]}),
    "sd3": Case("sd3", "sd3.safetensors", {"cfg": 4.0, "sampler_name": "dpmpp_2m", "scheduler": "sgm_uniform"}, 2),
    "sd3, odd size": Case("sd3", "sd3.safetensors", {"cfg": 2.0}, nodes=ODD, links={"latent_image": ["20", 0]}),
    "wan": Case("wan", "wan.safetensors", {"cfg": 5.0, "sampler_name": "uni_pc"}, 2, VIDEO),
    "wan, shift": Case("wan", "wan.safetensors", {"cfg": 1.0}, nodes=VIDEO | SD3_SHIFTED, links={"model": ["20", 0]}),
    "wan, masked": Case("wan", "wan.safetensors", {"cfg": 2.0}, nodes=FRAME_MASKED, links={"latent_image": ["23", 0]}),
    "wan, a picture": Case("wan", "wan.safetensors", {"cfg": 2.0, "denoise": 0.7}),
    "hunyuanvideo": Case("hunyuanvideo", "hunyuanvideo.safetensors", {"cfg": 2.0}, 2, VIDEO),
    "sd3, shift": Case("sd3", "sd3.safetensors", {"cfg": 2.0}, nodes=SD3_SHIFTED, links={"model": ["20", 0]}),
}
ZIMAGE_SHIFTED = {"20": {"class_type": "ModelSamplingAuraFlow", "inputs": {"shift": 5.0}}}
CASES |= {
    "zimage": Case("zimage", "zimage.safetensors", {"cfg": 2.0, "sampler_name": "res_multistep"}, 2, spec=ZIMAGE),
    "zimage, shift": Case(
        "zimage",
        "zimage.safetensors",
        {"cfg": 1.0},
        nodes=ZIMAGE_SHIFTED,
        links={"model": ["20", 0]},
        spec=ZIMAGE,
    ),
    "zimage, odd size": Case(
        "zimage", "zimage.safetensors", {"cfg": 1.0}, nodes=ODD, links={"latent_image": ["20", 0]}, spec=ZIMAGE
    ),
}
CASES |= {
    f"{model}, {' and '.join(loras)}": Case(
        pipeline,
        file,
        {"cfg": cfg},
        nodes={
            str(20 + number): {
                "class_type": "LoraLoaderModelOnly",
                "inputs": {
                    "model": ["2" if number == len(loras) - 1 else str(21 + number), 0],
                    "lora_name": f"{model} {format}.safetensors",
                    "strength_model": 0.7 - number,
                },
            }
            for number, format in enumerate(loras)
        },
        links={"model": ["20", 0]},
        spec=spec,
    )
    for model, pipeline, file, cfg, spec in (
        ("flux", "tiny", "", 1.0, None),
        ("sd3", "sd3", "sd3.safetensors", 3.0, None),
        ("zimage", "zimage", "zimage.safetensors", 2.0, ZIMAGE),
    )
    for loras in (("kohya",), ("lokr", "peft"), ("dora_of_outputs",), ("loha", "kohya"))
}
"""The last of several LoRAs is of negative strength."""
LATENT_TOLERANCE = 1e-4


@pytest.mark.parametrize("name", CASES)
def test_the_ranks_sample_what_comfyui_samples(host, name):
    case = CASES[name]
    if case.spec and case.spec.host_class and not host_has(case.spec.host_class):
        pytest.skip("this ComfyUI is older than the family")
    latents = {}
    native = {"class_type": "NativeFluxLoader", "inputs": {"pipeline": case.pipeline}}
    if case.file:
        native = {"class_type": "UNETLoader", "inputs": {"unet_name": case.file, "weight_dtype": "default"}}
    if case.spec:
        native = {"class_type": "NativeFileLoader", "inputs": native_inputs(host, case.file, case.spec)}
    for who, node in (("ranks", "ParallelDiTSampler"), ("native", "KSampler")):
        api = demo_with(f"diffusers/{case.pipeline}", **case.sampler) | copy.deepcopy(case.nodes)
        if who == "native":
            api["2"] = native
        elif case.file:
            api["2"]["inputs"]["model"] = case.file
        api["5"]["inputs"]["batch_size"] = case.batch
        api["6"]["class_type"] = node
        api["6"]["inputs"] |= case.links
        if "model" in case.links:
            api[case.links["model"][0]]["inputs"].setdefault("model", ["2", 0])
        latents[who] = latent(host, api, f"{name} {who}")
    assert latents["ranks"].shape == latents["native"].shape
    error = (latents["ranks"] - latents["native"]).norm() / latents["native"].norm()
    assert error < LATENT_TOLERANCE


def host_has(name: str) -> bool:
    """Whether this ComfyUI's `supported_models` has a class of that name."""
    return f"class {name}(" in (Path(os.environ["COMFYUI_PATH"]) / "comfy" / "supported_models.py").read_text()


def native_inputs(host, file: str, spec: FamilySpec) -> dict[str, str]:
    """Of the node that loads `file` natively."""
    assert spec.host_config
    found = detect(open_checkpoint(host.base / "models" / "diffusion_models" / file))
    return {"file": file, "config": json.dumps(spec.host_config(found.config)), "kind": spec.host_class or ""}


BY_VOIDS_SAMPLER = {
    "20": {"class_type": "VOIDSampler", "inputs": {}},
    "21": {
        "class_type": "BasicScheduler",
        "inputs": {"model": ["2", 0], "scheduler": "simple", "steps": STEPS, "denoise": 1.0},
    },
    "6": {
        "class_type": "SamplerCustom",
        "inputs": {
            "model": ["2", 0],
            "add_noise": True,
            "noise_seed": 0,
            "cfg": 2.0,
            "positive": ["3", 0],
            "negative": ["4", 0],
            "sampler": ["20", 0],
            "sigmas": ["21", 0],
            "latent_image": ["5", 0],
        },
    },
}
"""ComfyUI's DDIM for models that are trained as CogVideoX is: KSampler would give them other noise."""


def test_cogvideox_samples_as_comfyui_does_with_the_sampler_for_it(host):
    if not host_has("CogVideoX_T2V"):
        pytest.skip("this ComfyUI is older than the family")
    latents = {}
    for who in ("Parallel Sampler", "ranks", "native"):
        api = demo_with("diffusers/cogvideox", seed=0, cfg=2.0) | copy.deepcopy(VIDEO)
        api["2"]["inputs"]["model"] = "cogvideox.safetensors"
        if who != "Parallel Sampler":
            change(api, BY_VOIDS_SAMPLER)
        if who == "native":
            config = native_inputs(host, "cogvideox.safetensors", COGVIDEOX15)
            api["2"] = {"class_type": "NativeFileLoader", "inputs": config}
        latents[who] = latent(host, api, f"cogvideox {who}")
    native = latents["native"]
    for who in ("Parallel Sampler", "ranks"):
        assert (latents[who] - native).norm() / native.norm() < LATENT_TOLERANCE, who


HOOKED = {
    "20": {"class_type": "CreateHookKeyframe", "inputs": {"strength_mult": 0.3, "start_percent": 0.0}},
    "21": {
        "class_type": "CreateHookKeyframe",
        "inputs": {"strength_mult": 1.0, "start_percent": 0.5, "prev_hook_kf": ["20", 0]},
    },
    "22": {"class_type": "CreateHookLoraModelOnly", "inputs": {"lora_name": "", "strength_model": 0.9}},
    "23": {"class_type": "SetHookKeyframes", "inputs": {"hooks": ["22", 0], "hook_kf": ["21", 0]}},
    "24": {
        "class_type": "ConditioningSetProperties",
        "inputs": {"cond_NEW": ["3", 0], "strength": 1.0, "set_cond_area": "default", "hooks": ["23", 0]},
    },
    "25": {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"lora_name": "", "strength_model": 0.6, "model": ["2", 0]},
    },
    "6.model": ["25", 0],
    "6.positive": ["24", 0],
}
"""A LoRA of the model and one of the positive prompt alone, which works more in the second half of the steps."""


@pytest.mark.parametrize(("model", "cfg"), [("flux", 2.0), ("sd3", 3.0)])
def test_a_lora_of_one_prompt_works_under_stock_ksampler_as_in_comfyui(host, model, cfg):
    latents = {}
    for who in ("plain", "native", "ranks"):
        api = demo_with(NAME if model == "flux" else "diffusers/sd3") | {"6": stock(cfg=cfg)}
        change(
            api, HOOKED | {"22.lora_name": f"{model} peft.safetensors", "25.lora_name": f"{model} kohya.safetensors"}
        )
        if model == "sd3":
            api["2"]["inputs"]["model"] = "sd3.safetensors"
        if who == "native" and model == "sd3":
            api["2"] = {
                "class_type": "UNETLoader",
                "inputs": {"unet_name": "sd3.safetensors", "weight_dtype": "default"},
            }
        if who == "native" and model == "flux":
            api["2"] = {"class_type": "NativeFluxLoader", "inputs": {"pipeline": "tiny"}}
        if who == "plain":
            api["6"]["inputs"]["positive"] = ["3", 0]
        latents[who] = latent(host, api, f"{model} hooked {who}")
    native = latents["native"]
    assert (latents["ranks"] - native).norm() / native.norm() < LATENT_TOLERANCE
    assert (latents["plain"] - native).norm() / native.norm() > 100 * LATENT_TOLERANCE, "the prompt's LoRA does nothing"


PICTURE = {
    "20": {"class_type": "TinyVision", "inputs": {"seed": 1}},
    "21": {
        "class_type": "ParallelDiTIPAdapter",
        "inputs": {
            "model": ["2", 0],
            "clip_vision_output": ["20", 0],
            "weight": 0.8,
            "start_percent": 0.0,
            "end_percent": 0.7,
        },
    },
    "6.model": ["21", 0],
}


@pytest.mark.parametrize(("model", "cfg"), [("flux", 1.0), ("sd3", 3.0)])
def test_stock_ksampler_and_parallel_sampler_are_shown_the_same_picture(host, model, cfg):
    latents = {}
    for who in ("blind", "KSampler", "Parallel Sampler"):
        api = demo_with(NAME if model == "flux" else "diffusers/sd3", cfg=cfg, sampler_name="euler")
        if who != "Parallel Sampler":
            api["6"] = stock(
                **{name: api["6"]["inputs"][name] for name in ("seed", "cfg", "sampler_name", "scheduler")}
            )
        if who != "blind":
            change(api, PICTURE | {"21.ip_adapter": f"{model}.safetensors"})
        latents[who] = latent(host, api, f"{model} {who}")
    ours = latents["Parallel Sampler"]
    assert (latents["KSampler"] - ours).norm() / ours.norm() < LATENT_TOLERANCE
    assert (latents["blind"] - ours).norm() / ours.norm() > 100 * LATENT_TOLERANCE, (
        "the picture changes next to nothing"
    )
