"""The pack in a real ComfyUI, through its own queue: `COMFYUI_PATH` names a checkout, `COMFYUI_PYTHON` its Python."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from paralleldit.nodes import NODE_CLASS_MAPPINGS
from paralleldit.tests.comfyui.graphs import NAME, STEPS, change, demo_with, picture, psnr, stock
from paralleldit.tests.comfyui.host import PACK
from paralleldit.tools.demo_model.adapter_checks import chalk_verdicts, edge_agreement
from PIL import Image
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a checkout of ComfyUI"),
]


SAVED = sorted(path.stem for path in (PACK / "workflows").glob("*.json"))


def contrast(pixels: np.ndarray) -> np.ndarray:
    """How much each pixel differs from the background: the previews' colours are those of the full-size models."""
    return np.abs(pixels - np.median(pixels, axis=(0, 1))).sum(axis=-1).ravel()


def test_the_nodes_are_there_with_help(host):
    listed = host.get("/object_info")
    names = [name for name in listed if name.startswith("ParallelDiT")]
    assert set(names) == set(NODE_CLASS_MAPPINGS)
    assert all(listed[name]["category"] == "ParallelDiT" for name in names)
    models = listed["ParallelDiTLoader"]["input"]["required"]["model"][0]
    assert {"diffusers/guided", NAME, "sd3.safetensors"} <= set(models)
    for name in names:
        help_page = host.get(f"/extensions/ComfyUI-ParallelDiT/docs/{name}.md").decode()
        assert help_page.startswith(f"# {listed[name]['display_name']}")


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_workflow_has_no_unknown_node_and_no_unknown_input(host, name):
    listed = host.get("/object_info")
    api = json.loads((PACK / "workflows" / "api" / f"{name}.api.json").read_text())
    for key, entry in api.items():
        groups = listed[entry["class_type"]]["input"]
        known = {**groups["required"], **groups.get("optional", {})}
        assert set(entry["inputs"]) <= set(known), f"node {key}"
        assert set(groups["required"]) <= set(entry["inputs"]), f"node {key}"
    ui = json.loads((PACK / "workflows" / f"{name}.json").read_text())
    assert {node["type"] for node in ui["nodes"]} <= set(listed)


def test_the_demo_workflow_makes_a_picture_with_progress_and_previews(host, demo):
    run = host.run(demo)
    assert picture(host, run).shape == (96, 128, 3)
    steps = [event["value"] for event in run.of("progress") if event["node"] == "6" and event["max"] == STEPS]
    assert sorted(set(steps)) >= list(range(1, STEPS + 1))
    assert len(run.previews) == STEPS
    with Image.open(io.BytesIO(run.previews[-1])) as preview:
        assert preview.format == "JPEG"


@pytest.mark.parametrize("name", [name for name in SAVED if name.startswith("demo_")])
def test_a_saved_demo_workflow_runs_as_it_is(host, name):
    api = json.loads((PACK / "workflows" / "api" / f"{name}.api.json").read_text())
    run = host.run(api)
    shown = picture(host, run)
    size = next(node["inputs"] for node in api.values() if node["class_type"] == "EmptySD3LatentImage")
    assert shown.shape == (size["height"], size["width"], 3)
    if name == "demo_lora":
        assert all(chalk_verdicts(shown).values()), chalk_verdicts(shown)
        return  # its lines are too thin for a preview
    with Image.open(io.BytesIO(run.previews[-1])) as preview:
        coarse = np.array(preview.convert("RGB").resize((32, 32)))
    small = np.array(Image.fromarray(shown).resize((32, 32)))
    assert np.corrcoef(contrast(coarse), contrast(small))[0, 1] > 0.3
    if name == "demo_controlnet":
        with Image.open(PACK / "demo_model" / "input" / "paralleldit_edges.png") as edges:
            assert edge_agreement(shown, np.array(edges.convert("RGB")))["F1"] > 0.8


def test_without_comfyui_the_same_workflow_makes_the_same_picture(host, demo, base, tmp_path):
    native = picture(host, host.run(demo))
    path = tmp_path / "demo.json"
    path.write_text(json.dumps(demo))
    command = [sys.executable, str(PACK / "launcher"), "run", str(path), "--device=cpu", f"--models={base / 'models'}"]
    env = os.environ | {"PARALLELDIT_RUNTIME_DIR": str(tmp_path / "runtime"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"--output={tmp_path}"], capture_output=True, text=True, env=env, timeout=180, check=False
    )
    subprocess.run([sys.executable, str(PACK / "launcher"), "stop"], env=env, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "paralleldit_demo_00001_.png") as image:
        assert psnr(native, np.array(image)) > 60


@dataclass(frozen=True)
class Case:
    """One run of ComfyUI and of the ranks; `nodes` are added to the graph, `links` set inputs of the sampler.

    `file`: the transformer, in a file that ComfyUI loads by itself, instead of the pipeline's.
    """

    pipeline: str = "tiny"
    file: str = ""
    sampler: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    nodes: dict[str, Any] = field(default_factory=dict)
    links: dict[str, Any] = field(default_factory=dict)


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
    "sd3, shift": Case("sd3", "sd3.safetensors", {"cfg": 2.0}, nodes=SD3_SHIFTED, links={"model": ["20", 0]}),
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
    )
    for model, pipeline, file, cfg in (("flux", "tiny", "", 1.0), ("sd3", "sd3", "sd3.safetensors", 3.0))
    for loras in (("kohya",), ("lokr", "peft"), ("dora_of_outputs",), ("loha", "kohya"))
}
"""The last of several LoRAs is of negative strength."""
LATENT_TOLERANCE = 1e-4


@pytest.mark.parametrize("name", CASES)
def test_the_ranks_sample_what_comfyui_samples(host, name):
    case = CASES[name]
    latents = {}
    native = {"class_type": "NativeFluxLoader", "inputs": {"pipeline": case.pipeline}}
    if case.file:
        native = {"class_type": "UNETLoader", "inputs": {"unet_name": case.file, "weight_dtype": "default"}}
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
        prefix = f"{name} {who}"
        api["9"] = {"class_type": "SaveLatent", "inputs": {"samples": ["6", 0], "filename_prefix": prefix}}
        run = host.run(api)
        assert not run.error, run.error
        latents[who] = load_file(host.base / "output" / f"{prefix}_00001_.latent")["latent_tensor"]
    assert latents["ranks"].shape == latents["native"].shape
    error = (latents["ranks"] - latents["native"]).norm() / latents["native"].norm()
    assert error < LATENT_TOLERANCE


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
        prefix = f"{model} hooked {who}"
        api["9"] = {"class_type": "SaveLatent", "inputs": {"samples": ["6", 0], "filename_prefix": prefix}}
        run = host.run(api)
        assert not run.error, run.error
        latents[who] = load_file(host.base / "output" / f"{prefix}_00001_.latent")["latent_tensor"]
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
        prefix = f"{model} {who}"
        api["9"] = {"class_type": "SaveLatent", "inputs": {"samples": ["6", 0], "filename_prefix": prefix}}
        run = host.run(api)
        assert not run.error, run.error
        latents[who] = load_file(host.base / "output" / f"{prefix}_00001_.latent")["latent_tensor"]
    ours = latents["Parallel Sampler"]
    assert (latents["KSampler"] - ours).norm() / ours.norm() < LATENT_TOLERANCE
    assert (latents["blind"] - ours).norm() / ours.norm() > 100 * LATENT_TOLERANCE, (
        "the picture changes next to nothing"
    )


def test_an_interrupt_ends_the_run_within_a_step_and_the_next_prompt_works(host, demo):
    long = copy.deepcopy(demo)
    long["6"]["inputs"] |= {"steps": 1000, "seed": 1}
    began = time.monotonic()
    run = host.run(long, interrupt_at=3)
    assert run.of("execution_interrupted")
    assert max(event["value"] for event in run.of("progress")) < 100
    assert time.monotonic() - began < 30
    demo["6"]["inputs"]["seed"] = 2
    began = time.monotonic()
    picture(host, host.run(demo))
    assert time.monotonic() - began < 20, "the sidecar was not warm"


def test_a_layout_that_cannot_work_is_refused_by_the_queue(host, demo):
    demo["1"]["inputs"]["ulysses_degree"] = 3
    answer = host.refusal(demo)
    assert "ulysses_degree=3" in answer
    assert "2 ranks" in answer


def test_text_and_latents_of_comfyuis_own_nodes_and_its_vae_nodes_work(host, demo):
    demo["8"] = {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["7", 0]}}
    demo["5"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 96, "batch_size": 2}}
    run = host.run(demo)
    assert picture(host, run).shape == (96, 128, 3)
    assert len(run.pictures()) == 2


def test_a_picture_is_changed_only_where_the_mask_says(host, demo):
    demo |= {
        "20": {"class_type": "EmptyImage", "inputs": {"width": 128, "height": 96, "batch_size": 1, "color": 0x00FF00}},
        "21": {"class_type": "VAEEncode", "inputs": {"pixels": ["20", 0], "vae": ["7", 0]}},
        "22": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 128, "height": 96}},
        "23": {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 64, "height": 96}},
        "24": {
            "class_type": "MaskComposite",
            "inputs": {"destination": ["22", 0], "source": ["23", 0], "x": 0, "y": 0, "operation": "multiply"},
        },
        "25": {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["21", 0], "mask": ["24", 0]}},
        "26": {"class_type": "SaveLatent", "inputs": {"samples": ["21", 0], "filename_prefix": "before"}},
        "27": {"class_type": "SaveLatent", "inputs": {"samples": ["6", 0], "filename_prefix": "after"}},
    }
    demo["6"]["inputs"] |= {"latent_image": ["25", 0], "denoise": 0.6}
    run = host.run(demo)
    assert not run.error, run.error
    before, after = (
        load_file(host.base / "output" / f"{name}_00001_.latent")["latent_tensor"] for name in ("before", "after")
    )
    difference = (after - before).abs()
    assert difference[..., :7].max() < 1e-4
    assert difference[..., 9:].mean() > 0.1


STOCK = stock()


def test_stock_ksampler_samples_in_the_ranks_with_progress_and_previews(host, demo):
    demo["6"] = stock(cfg=3.0)
    run = host.run(demo)
    assert picture(host, run).shape == (96, 128, 3)
    steps = [event["value"] for event in run.of("progress") if event["node"] == "6" and event["max"] == STEPS]
    assert sorted(set(steps)) >= list(range(1, STEPS + 1))
    assert len(run.previews) == STEPS


def test_an_interrupt_ends_stock_ksampler_within_a_step_and_the_sidecar_stays_warm(host, demo):
    long = copy.deepcopy(demo)
    long["6"] = stock(steps=1000)
    run = host.run(long, interrupt_at=3)
    assert run.of("execution_interrupted")
    assert max(event["value"] for event in run.of("progress")) < 100
    demo["6"] = stock(seed=2)
    began = time.monotonic()
    picture(host, host.run(demo))
    assert time.monotonic() - began < 20, "the sidecar was not warm"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"6": STOCK, "1.pipefusion_degree": 2}, "Use Parallel Sampler"),
        (
            {
                "6": STOCK,
                "20": {"class_type": "TomePatchModel", "inputs": {"model": ["2", 0], "ratio": 0.3}},
                "6.model": ["20", 0],
            },
            "attn1",
        ),
        (
            {"6": STOCK, "20": {"class_type": "ModelSave", "inputs": {"model": ["2", 0], "filename_prefix": "x"}}},
            "neither merged nor saved",
        ),
        (
            {
                "6": STOCK,
                "20": {
                    "class_type": "ModelMergeSimple",
                    "inputs": {"model1": ["2", 0], "model2": ["2", 0], "ratio": 0.5},
                },
                "6.model": ["20", 0],
            },
            "neither merged nor saved",
        ),
        (
            {
                "20": {"class_type": "RescaleCFG", "inputs": {"model": ["2", 0], "multiplier": 0.7}},
                "6.model": ["20", 0],
            },
            "sampler_cfg_function",
        ),
        (
            {
                "20": {
                    "class_type": "ModelSamplingDiscrete",
                    "inputs": {"model": ["2", 0], "sampling": "v_prediction", "zsnr": False},
                },
                "6.model": ["20", 0],
            },
            "V_PREDICTION",
        ),
        (
            {"20": {"class_type": "TomePatchModel", "inputs": {"model": ["2", 0], "ratio": 0.3}}, "6.model": ["20", 0]},
            "attn1",
        ),
    ],
    ids=[
        "stock, PipeFusion",
        "stock, attention patch",
        "save",
        "merge",
        "cfg function",
        "other prediction",
        "attention patch",
    ],
)
def test_what_cannot_travel_is_refused_by_name(host, demo, changes, words):
    demo["6"]["inputs"]["seed"] = 99
    change(demo, changes)
    assert words in host.run(demo).error


def test_two_prompts_one_of_them_in_an_area_run_in_the_parallel_sampler(host, demo):
    demo["6"]["inputs"]["seed"] = 98
    plain = picture(host, host.run(demo))
    change(
        demo,
        {
            "20": {
                "class_type": "ConditioningSetArea",
                "inputs": {"width": 64, "height": 64, "x": 0, "y": 0, "strength": 1.0, "conditioning": ["4", 0]},
            },
            "21": {
                "class_type": "ConditioningCombine",
                "inputs": {"conditioning_1": ["3", 0], "conditioning_2": ["20", 0]},
            },
            "6.positive": ["21", 0],
        },
    )
    assert not np.array_equal(picture(host, host.run(demo)), plain)


def test_status_and_unload_run_in_the_graph(host, demo):
    demo["20"] = {"class_type": "ParallelDiTStatus", "inputs": {"after": ["6", 0]}}
    demo["21"] = {"class_type": "ParallelDiTUnload", "inputs": {"after": ["6", 0]}}
    run = host.run(demo)
    assert not run.error, run.error
    shown = {data["node"]: data["output"].get("text", [""])[0] for data in run.of("executed")}
    assert "2 ranks on cpu" in shown["20"]
    assert "Freed" in shown["21"]
    picture(host, host.run(demo_with(NAME, seed=5)))
