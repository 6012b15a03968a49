"""The ranks through what happens to a ComfyUI: restarts, freed memory, a killed rank, many prompts, several models."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from paralleldit.tests.comfyui.graphs import NAME, demo_with, picture, psnr, stock

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a checkout of ComfyUI"),
]


def stock_with(pipeline: str, **sampler: Any) -> dict[str, Any]:
    return demo_with(pipeline) | {"6": stock(**sampler)}


def test_a_killed_rank_is_an_error_in_the_graph_and_the_next_prompt_works(host):
    picture(host, host.run(demo_with(NAME, seed=33)))
    victim = host.ranks()[-1]
    code = f"import os, time; time.sleep(2); os.kill({victim}, {signal.SIGKILL})"
    killer = subprocess.Popen([sys.executable, "-c", code])
    run = host.run(demo_with(NAME, steps=1000, seed=3))
    killer.wait()
    assert "SIGKILL" in run.error or "killed" in run.error, run.error
    picture(host, host.run(demo_with(NAME, seed=4)))


def test_a_model_that_comfyui_has_cached_works_in_a_new_sidecar(host):
    picture(host, host.run(stock_with(NAME, seed=5)))
    host.stop_ranks()
    run = host.run(stock_with(NAME, seed=6))
    picture(host, run)
    assert "2" in run.of("execution_cached")[0]["nodes"]
    assert {"start", "load"} <= run.phases


@pytest.mark.parametrize("with_seed", [stock_with, demo_with])
def test_freeing_comfyuis_memory_frees_that_of_the_ranks(host, with_seed):
    picture(host, host.run(with_seed(NAME, seed=7)))
    assert {"model", "vae"} <= {model["kind"] for model in host.models()}
    host.post("/free", {"unload_models": True, "free_memory": True})
    deadline = time.monotonic() + 30
    while host.models() and time.monotonic() < deadline:
        time.sleep(0.3)
    assert not host.models()
    assert host.ranks()
    picture(host, host.run(with_seed(NAME, seed=8)))


@pytest.mark.parametrize("with_seed", [stock_with, demo_with])
def test_a_cancel_while_nothing_runs_does_not_end_the_queue_when_memory_is_freed(host, with_seed):
    picture(host, host.run(with_seed(NAME, seed=11)))
    for _ in range(2):
        host.post("/interrupt", {})
    host.post("/free", {"unload_models": True, "free_memory": True})
    deadline = time.monotonic() + 30
    while host.models() and time.monotonic() < deadline:
        time.sleep(0.3)
    assert not host.models()
    picture(host, host.run(with_seed(NAME, seed=12)))


def test_two_models_in_one_graph_sample_what_each_samples_alone(host):
    names = (NAME, "diffusers/sd3")
    alone = [picture(host, host.run(demo_with(name, seed=9, cfg=3.0))) for name in names]
    first, second = (stock_with(name, seed=9, cfg=3.0) for name in names)
    second = {f"1{key}": copy.deepcopy(entry) for key, entry in second.items()}
    for entry in second.values():
        entry["inputs"] = {
            name: [f"1{value[0]}", value[1]] if isinstance(value, list) else value
            for name, value in entry["inputs"].items()
        }
    run = host.run(first | second)
    assert not run.error, run.error
    saved = {data["node"]: data["output"]["images"][0] for data in run.of("executed") if "images" in data["output"]}
    together = [picture(host, run, saved[node]) for node in ("9", "19")]
    assert all(psnr(one, other) > 60 for one, other in zip(alone, together, strict=True))
    held = {model["path"].rsplit("/", 1)[-1] for model in host.models() if model["kind"] == "model"}
    assert held == {"tiny", "sd3"} or "makes room" in host.log.read_text()


def test_many_prompts_are_sampled_one_after_the_other_past_one_that_fails(host):
    prompts = [stock_with(NAME, seed=seed) for seed in range(51, 56)]
    prompts[2]["20"] = {"class_type": "TomePatchModel", "inputs": {"model": ["2", 0], "ratio": 0.3}}
    prompts[2]["6"]["inputs"]["model"] = ["20", 0]
    told = host.queue(prompts)
    assert [each["status"]["status_str"] for each in told] == ["success", "success", "error", "success", "success"]
    files = [out["images"][0] for each in told for out in each["outputs"].values() if out.get("images")]
    assert len(files) == 4
    assert len({host.view(file) for file in files}) == 4


def test_a_video_is_encoded_and_decoded_by_comfyuis_nodes_and_ours(host):
    from diffusers import AutoencoderKLWan

    frames = {"width": 48, "height": 32, "batch_size": 5, "color": 0x20C040}
    loader = {"class_type": "ParallelDiTVAELoader", "inputs": {"vae": "diffusers/video", "weight_dtype": "auto"}}
    decoded = {"samples": ["3", 0], "vae": ["1", 0]}
    api: dict[str, Any] = {
        "1": loader,
        "2": {"class_type": "EmptyImage", "inputs": frames},
        "3": {"class_type": "VAEEncode", "inputs": {"pixels": ["2", 0], "vae": ["1", 0]}},
        "4": {"class_type": "VAEDecode", "inputs": decoded},
        "5": {"class_type": "ParallelDiTVAEDecode", "inputs": decoded | {"tile_size": 0, "overlap": 64}},
    }
    for source, save in (("4", "6"), ("5", "7")):
        api[save] = {"class_type": "SaveImage", "inputs": {"images": [source, 0], "filename_prefix": f"video {source}"}}
    run = host.run(api)
    assert not run.error, run.error
    vae = AutoencoderKLWan.from_pretrained(host.base / "models" / "diffusers" / "video" / "vae")
    colour = torch.tensor([0x20, 0xC0, 0x40]) / 255
    video = (2 * colour - 1).reshape(1, 3, 1, 1, 1).expand(1, 3, 5, 32, 48)
    with torch.inference_mode():
        expected = vae.decode(vae.encode(video).latent_dist.mode()).sample[0].add(1).div(2).clamp(0, 1)
    for data in run.of("executed"):
        shown = [picture(host, run, image).astype(float) for image in data["output"]["images"]]
        for number, (one, whole) in enumerate(zip(shown, expected.permute(1, 2, 3, 0).numpy(), strict=True)):
            assert np.abs(one - 255 * whole).max() <= 1.5, f"frame {number} of node {data['node']}"


def test_a_comfyui_that_starts_again_keeps_the_warm_ranks_and_ends_those_that_it_does_not_want(host):
    picture(host, host.run(stock_with(NAME, seed=61)))
    before = host.ranks()
    assert len(before) == 2
    host.restart()
    assert host.ranks() == before
    run = host.run(stock_with(NAME, seed=62))
    picture(host, run)
    assert "2" not in run.of("execution_cached")[0]["nodes"]
    assert host.ranks() == before
    assert not {"start", "load"} & run.phases
    alone = stock_with(NAME, seed=63)
    alone["1"]["inputs"]["ranks"] = 1
    picture(host, host.run(alone))
    assert len(host.ranks()) == 1
    assert not set(host.ranks()) & set(before)
    assert not any(is_alive(pid) for pid in before)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
