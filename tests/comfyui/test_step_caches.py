"""Step caches in a real ComfyUI: ours under its samplers and under Parallel Sampler, and its own on our MODEL."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
from paralleldit.tests.comfyui.graphs import change, demo_with, stock
from paralleldit.tests.comfyui.test_stock_nodes import CUSTOM, TOLERANCE
from safetensors.torch import load_file
from torch import Tensor

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a checkout of ComfyUI"),
]

STEPS = 6
SETTINGS = {"seed": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "steps": STEPS}
CACHE = {
    "20": {
        "class_type": "ParallelDiTCache",
        "inputs": {"model": ["2", 0], "kind": "first block", "threshold": 2.0, "prediction": "same", "max_skips": 1},
    }
}
CUSTOM_ADVANCED = CUSTOM | {"32.steps": STEPS}
DUAL = {
    "33": {
        "class_type": "DualModelGuider",
        "inputs": {"model_negative": ["22", 0], "positive": ["3", 0], "negative": ["4", 0], "cfg": 3.0},
    },
    "21": {
        "class_type": "ParallelDiTLoader",
        "inputs": {"model": "diffusers/guided", "weight_dtype": "fp32", "layout": ["1", 0]},
    },
    "22": {"class_type": "ParallelDiTCache", "inputs": CACHE["20"]["inputs"] | {"model": ["21", 0]}},
}
"""The negative prompt is asked of a model of its own."""
SAMPLERS: dict[str, dict[str, Any]] = {
    "Parallel Sampler": {"6.model": ["20", 0]},
    "KSampler": {"6": stock(**SETTINGS), "6.model": ["20", 0]},
    "SamplerCustomAdvanced": CUSTOM_ADVANCED | {"33.model": ["20", 0]},
    "SamplerCustomAdvanced, two models": CUSTOM_ADVANCED | DUAL | {"33.model": ["20", 0]},
}
OWN_CACHES = ("EasyCache", "LazyCache")


class Trials:
    def __init__(self, host: Any) -> None:
        self.host = host
        self.count = 0

    def run(self, changes: dict[str, Any], native: bool = False) -> tuple[Tensor, list[str], str]:
        """The latent, what was shown on the sampler, and what was logged."""
        self.count += 1
        api = demo_with("diffusers/guided", **SETTINGS)
        if native:
            api["2"] = {"class_type": "NativeFluxLoader", "inputs": {"pipeline": "guided"}}
        change(api, changes)
        prefix = f"cached {self.count}"
        api["9"] = {"class_type": "SaveLatent", "inputs": {"samples": ["6", 0], "filename_prefix": prefix}}
        seen = len(self.host.log.read_text())
        run = self.host.run(api)
        assert not run.error, run.error
        latent = load_file(self.host.base / "output" / f"{prefix}_00001_.latent")["latent_tensor"]
        return latent, [text for node, text in run.texts if node == "6"], self.host.log.read_text()[seen:]


@pytest.fixture(scope="module")
def trials(host) -> Trials:
    return Trials(host)


def error_of(latent: Tensor, expected: Tensor) -> float:
    return float((latent - expected).norm() / expected.norm())


def test_every_sampler_skips_alike_and_the_user_is_told(trials):
    plain, _, _ = trials.run({})
    said = f"Step cache: {STEPS // 2} of {STEPS} evaluations computed in full."
    latents = {}
    for name, changes in SAMPLERS.items():
        if "two models" in name and "DualModelGuider" not in trials.host.get("/object_info"):
            continue
        latents[name], shown, logged = trials.run(CACHE | changes)
        assert said in shown, name
        assert said in logged, name
        assert trials.host.get("/paralleldit/status")["activity"]["evaluations"] == [STEPS // 2, STEPS], name
        assert error_of(latents[name], latents["Parallel Sampler"]) <= TOLERANCE, name
    assert error_of(latents["Parallel Sampler"], plain) > TOLERANCE, "what is skipped must matter"
    trials.run({})
    assert trials.host.get("/paralleldit/status")["activity"]["evaluations"] is None


@pytest.mark.parametrize("name", OWN_CACHES)
def test_comfyuis_own_caches_skip_with_our_model_what_they_skip_with_its_own(trials, name):
    inputs = {"model": ["2", 0], "reuse_threshold": 3.0, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    changes = {"20": {"class_type": name, "inputs": inputs}, "6": stock(**SETTINGS), "6.model": ["20", 0]}
    (native, _, native_log), (ours, _, log) = (trials.run(changes, native) for native in (True, False))
    skipped = [re.findall(rf"{name} - skipped (\d+)/{STEPS}", each) for each in (native_log, log)]
    assert skipped[0] == skipped[1]
    assert int(skipped[0][0]) > 0
    assert error_of(ours, native) <= TOLERANCE
