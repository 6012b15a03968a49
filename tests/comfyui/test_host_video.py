"""A video in a real ComfyUI's queue: sampled by both samplers, decoded in the ranks, saved by ComfyUI's own node."""

from __future__ import annotations

import copy
import io
import os
from typing import Any

import numpy as np
import pytest
from paralleldit.tests.comfyui.graphs import demo_with, latent, stock
from PIL import Image, ImageSequence

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a checkout of ComfyUI"),
]

FRAMES, WIDTH, HEIGHT = 9, 48, 64


def graph(**changes: Any) -> dict[str, Any]:
    """Wan from ComfyUI's single file, with umt5 and the VAE from the diffusers folder."""
    api = demo_with("diffusers/wan", cfg=2.0)
    api["2"]["inputs"]["model"] = "wan.safetensors"
    size = {"width": WIDTH, "height": HEIGHT, "length": FRAMES, "batch_size": 1}
    api["5"] = {"class_type": "EmptyHunyuanLatentVideo", "inputs": size}
    api["1"]["inputs"] |= changes
    return api


def frames_of(host, api: dict[str, Any]) -> tuple[np.ndarray, list[bytes]]:
    """Of the animated WebP of a run `[T, H, W, 3]`, and its previews."""
    api["9"] = {
        "class_type": "SaveAnimatedWEBP",
        "inputs": {
            "filename_prefix": "wan",
            "fps": 16.0,
            "lossless": True,
            "quality": 90,
            "method": "fastest",
            "images": ["8", 0],
        },
    }
    run = host.run(api)
    assert not run.error, run.error
    with Image.open(io.BytesIO(host.view(run.pictures()[0]))) as video:
        assert video.format == "WEBP"
        return np.stack([np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(video)]), run.previews


def test_a_video_is_sampled_decoded_and_saved(host):
    whole, previews = frames_of(host, graph())
    assert whole.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert previews
    assert np.abs(np.diff(whole.astype(float), axis=0)).mean() > 0.5, "nothing moves"
    stepwise = graph()
    stepwise["6"] = stock(cfg=2.0, seed=stepwise["6"]["inputs"]["seed"])
    by_ksampler, previews = frames_of(host, stepwise)
    assert previews
    assert np.abs(by_ksampler.astype(float) - whole).max() <= 2


def test_ksampler_and_parallel_sampler_give_the_same_latent_of_a_video(host):
    ours = latent(host, graph(), "video ours")
    stepwise = graph()
    stepwise["6"] = stock(cfg=2.0, seed=stepwise["6"]["inputs"]["seed"])
    theirs = latent(host, stepwise, "video stepwise")
    assert ours.shape == theirs.shape == (1, 16, 3, HEIGHT // 8, WIDTH // 8)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize(
    "layout",
    [{"ulysses_degree": 2, "ring_degree": 1, "cfg_degree": 1}, {"pipefusion_degree": 2, "num_patches": 1}],
    ids=str,
)
def test_a_video_is_the_same_in_every_layout_without_old_keys(host, layout):
    ours = latent(host, copy.deepcopy(graph()), "video automatic")
    other = latent(host, graph(**layout), f"video {layout}")
    assert (ours - other).norm() / other.norm() < 1e-5
