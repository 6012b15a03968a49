"""The pack in a real ComfyUI, through its own queue: `COMFYUI_PATH` names a checkout, `COMFYUI_PYTHON` its Python."""

from __future__ import annotations

import copy
import http.client
import io
import json
import os
import subprocess
import sys
import time

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
    assert {node["type"] for node in ui["nodes"]} - {"MarkdownNote"} <= set(listed)


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
    command = [sys.executable, str(PACK / "cli"), "run", str(path), "--device=cpu", f"--models={base / 'models'}"]
    env = os.environ | {"PARALLELDIT_RUNTIME_DIR": str(tmp_path / "runtime"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"--output={tmp_path}"], capture_output=True, text=True, env=env, timeout=180, check=False
    )
    subprocess.run([sys.executable, str(PACK / "cli"), "stop"], env=env, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "paralleldit_demo_00001_.png") as image:
        assert psnr(native, np.array(image)) > 60


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
    faulty = json.loads(answer)["node_errors"]
    assert [len(node["errors"]) for node in faulty.values()] == [1], "one wrong degree is one error"


def test_an_errors_type_is_shown_without_the_path_of_a_file(host, demo):
    demo["6"]["inputs"] |= {"seed": 97, "cfg": 3.0}
    del demo["6"]["inputs"]["negative"]
    (error,) = host.run(demo).of("execution_error")
    assert error["exception_type"] == "ParallelDiT.UserError"
    panel = host.get("/paralleldit/status")
    assert "needs a negative prompt" in panel["activity"]["error"]["message"]


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


def test_the_demo_model_and_its_controlnet_are_sampled_alike_by_stock_ksampler(host):
    """Its VAE has a scale of its own, and its ControlNet is evaluated in the ranks."""
    api = json.loads((PACK / "workflows" / "api" / "demo_controlnet.api.json").read_text())
    api["6"]["inputs"] |= {"steps": 6, "seed": 21}
    ours = picture(host, host.run(api))
    api["6"]["class_type"] = "KSampler"
    theirs = picture(host, host.run(api))
    assert psnr(ours, theirs) > 50
    api["6"]["inputs"] |= {"positive": ["3", 0], "negative": ["4", 0]}
    assert psnr(picture(host, host.run(api)), theirs) < 40, "the ControlNet changes next to nothing"


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


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, 200),
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "192.168.1.5:{port}"}, 200),
        ({"Host": "comfy.example", "Referer": "https://comfy.example/", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": "evil.example:{port}"}, 403),
        ({"Host": "evil.example:{port}", "Origin": "http://evil.example:{port}"}, 403),
        ({"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
    ],
    ids=str,
)
def test_the_panel_answers_pages_of_this_comfyui_alone(host, headers, code):
    headers = {name: value.format(port=host.port) for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", host.port, timeout=60)
    connection.request("GET", "/paralleldit/status", headers=headers)
    answer = connection.getresponse()
    told = answer.read()
    assert (answer.status, b'"state"' in told) == (code, code == 200)
    connection.close()
