"""Every node of ComfyUI that changes a MODEL, guides or samples: as with ComfyUI's own MODEL, or refused by name.

    COMFYUI_PATH=... python -m pytest tests/comfyui/test_stock_nodes.py -s

prints what came of each. Nodes are tried with the values that they show at first, on tiny models of random weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from paralleldit.parallel_backend.sampling.names import SAMPLER_NAMES, SCHEDULER_NAMES
from paralleldit.tests.comfyui.graphs import STEPS, change, demo_with, stock
from safetensors.torch import load_file
from torch import Tensor

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a checkout of ComfyUI"),
]

FILE = "sd3.safetensors"
NATIVE = {
    "sd3": {"class_type": "UNETLoader", "inputs": {"unet_name": FILE, "weight_dtype": "default"}},
    "flux": {"class_type": "NativeFluxLoader", "inputs": {"pipeline": "guided"}},
}
"""The loaders of ComfyUI's own MODELs."""
PIPELINES = {"sd3": "diffusers/sd3", "flux": "diffusers/guided"}
SETTINGS = {"seed": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"}
TOLERANCE = 1e-4
PLACES = {"MODEL": ["2", 0], "CONDITIONING": ["4", 0], "VAE": ["7", 0], "LATENT": ["5", 0]}
"""Where a node's inputs of these types come from."""
POSITIVE, EMPTY = ["3", 0], ["40", 0]
OF_POSITIVE = ("positive", "cond1", "conditioning")
"""Inputs of the positive prompt; others of its type take the negative one."""
VALUES = ("INT", "FLOAT", "STRING", "BOOLEAN")
TELLING = {
    "SkipLayerGuidanceSD3": {"layers": "0", "start_percent": 0.0, "end_percent": 1.0},
    "SkipLayerGuidanceDiT": {"double_layers": "0", "start_percent": 0.0, "end_percent": 1.0},
    "PerpNegGuider": {"empty_conditioning": EMPTY},
    "PerpNeg": {"empty_conditioning": EMPTY},
}
"""Values with which a node does something to so small a model."""
SKIPPED = {
    "TorchCompileModel": "compiles ComfyUI's own model for minutes",
    "TrainLoraNode": "reads weights, which are not here: torch says so, not we",
    "HypernetworkLoader": "needs a file",
}
REFUSED, FAILS = "refused: ", "fail in ComfyUI's own model, too"
CUSTOM = {
    "30": {"class_type": "RandomNoise", "inputs": {"noise_seed": 3}},
    "31": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    "32": {
        "class_type": "BasicScheduler",
        "inputs": {"model": ["2", 0], "scheduler": "simple", "steps": STEPS, "denoise": 1.0},
    },
    "33": {
        "class_type": "CFGGuider",
        "inputs": {"model": ["2", 0], "positive": ["3", 0], "negative": ["4", 0], "cfg": 3.0},
    },
    "6": {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            "noise": ["30", 0],
            "guider": ["33", 0],
            "sampler": ["31", 0],
            "sigmas": ["32", 0],
            "latent_image": ["5", 0],
        },
    },
}


class Trials:
    """Runs of one workflow: with ComfyUI's own MODEL, and with that of Parallel Loader."""

    def __init__(self, host: Any, model: str) -> None:
        self.host = host
        self.model = model
        self.count = 0

    def latent(self, who: str, changes: dict[str, Any]) -> Tensor | tuple[str, str]:
        """The LATENT, or the class and the text of the error. `who`: native, ranks, or sampler for Parallel Sampler."""
        api = demo_with(PIPELINES[self.model], **SETTINGS)
        if self.model == "sd3":
            api["2"]["inputs"]["model"] = FILE
        api["40"] = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["4", 0]}}
        if who == "native":
            api["2"] = NATIVE[self.model]
        if who != "sampler":
            api["6"] = stock(**SETTINGS)
        change(api, changes)
        for node in api.values():
            if "lora_name" in node["inputs"]:
                node["inputs"]["lora_name"] = f"{self.model} kohya.safetensors"
        self.count += 1
        prefix = f"{self.model} trial {self.count}"
        api["9"] = {"class_type": "SaveLatent", "inputs": {"samples": ["6", 0], "filename_prefix": prefix}}
        run = self.host.run(api)
        for error in run.of("execution_error"):
            return error["exception_type"].rsplit(".", 1)[-1], error["exception_message"]
        return load_file(self.host.base / "output" / f"{prefix}_00001_.latent")["latent_tensor"]

    def verdicts(self, changes: dict[str, Any], whos: tuple[str, ...]) -> list[tuple[bool, str]]:
        """For each of `whos` whether it is right, and what came of it, beside ComfyUI's own MODEL."""
        native = self.latent("native", changes)
        found = []
        for who in whos:
            ours = self.latent(who, changes)
            if not isinstance(native, Tensor):
                fails = not isinstance(ours, Tensor)
                found.append((fails, FAILS if fails else f"works, where ComfyUI's own fails: {native[1].strip()}"))
            elif not isinstance(ours, Tensor):
                kind, text = ours
                found.append((kind == "UserError", f"{REFUSED}{text.strip()}"))
            else:
                error = float((ours - native).norm() / native.norm())
                found.append((error <= TOLERANCE, f"{error:.1e}"))
        return found


@pytest.fixture(scope="module", params=list(NATIVE))
def trials(host, request) -> Trials:
    return Trials(host, request.param)


@pytest.fixture(scope="module")
def listed(host) -> dict[str, Any]:
    return host.get("/object_info")


def judge(model: str, rows: dict[str, list[tuple[bool, str]]]) -> None:
    print(f"\n{model}:")
    for texts in zip(*([text for _, text in verdicts] for verdicts in rows.values()), strict=True):
        refused, failing = sum(text.startswith(REFUSED) for text in texts), texts.count(FAILS)
        equal = [text for text in texts if text != FAILS and not text.startswith(REFUSED)]
        print(f"{len(equal)} equal to {max(equal, key=float, default='')}, {refused} refused, {failing} {FAILS}")
    for name, verdicts in rows.items():
        print("|", " | ".join([name, *(text.splitlines()[0][:110] for _, text in verdicts)]), "|")
    faults = {name: verdicts for name, verdicts in rows.items() if not all(right for right, _ in verdicts)}
    assert not faults


def first_values(info: dict[str, Any]) -> dict[str, Any] | None:
    """What a node's required inputs are at first; None where one is of a type that the workflow has not."""
    inputs: dict[str, Any] = {}
    for name, spec in info["input"].get("required", {}).items():
        kind, options = spec[0], spec[1] if len(spec) > 1 else {}
        menu = kind if isinstance(kind, list) else options.get("options")
        if menu:
            inputs[name] = options.get("default", menu[0])
        elif str(kind) in VALUES:
            inputs[name] = options.get("default", 0)
        elif str(kind) in PLACES:
            inputs[name] = POSITIVE if name in OF_POSITIVE else PLACES[kind]
        else:
            return None
    return inputs


def nodes_giving(listed: dict[str, Any], output: str, taking: str = "") -> Iterator[tuple[str, dict[str, Any], int]]:
    """ComfyUI's nodes with that output: their names, inputs and the output's number."""
    for name, info in sorted(listed.items()):
        inputs = first_values(info)
        if output not in info["output"] or inputs is None or name in SKIPPED or name.startswith("ParallelDiT"):
            continue
        if not taking or PLACES[taking] in inputs.values():
            yield name, inputs | TELLING.get(name, {}), info["output"].index(output)


def test_nodes_that_change_a_model(trials, listed):
    rows = {}
    for name, inputs, output in nodes_giving(listed, "MODEL", taking="MODEL"):
        if name.startswith("ModelMerge") and name != "ModelMergeSimple":
            continue  # they all ask for the weights, as that one does
        changes = {"20": {"class_type": name, "inputs": inputs}, "6.model": ["20", output]}
        rows[name] = trials.verdicts(changes, ("ranks", "sampler"))
    assert len(rows) > 20
    judge(trials.model, rows)


def test_guiders(trials, listed):
    rows = {}
    for name, inputs, output in nodes_giving(listed, "GUIDER", taking="MODEL"):
        changes = CUSTOM | {"33": {"class_type": name, "inputs": inputs}, "6.guider": ["33", output]}
        rows[name] = trials.verdicts(changes, ("ranks",))
    assert {"BasicGuider", "CFGGuider", "DualCFGGuider"} <= set(rows)
    judge(trials.model, rows)


def test_samplers_of_their_own_nodes(trials, listed):
    rows = {}
    for name, inputs, output in nodes_giving(listed, "SAMPLER"):
        changes = CUSTOM | {"31": {"class_type": name, "inputs": inputs}, "6.sampler": ["31", output]}
        rows[name] = trials.verdicts(changes, ("ranks",))
    assert len(rows) > 5
    judge(trials.model, rows)


def test_samplers_and_schedulers_that_parallel_sampler_does_not_list(trials, listed):
    required = listed["KSampler"]["input"]["required"]
    rows = {}
    for setting, known in (("sampler_name", SAMPLER_NAMES), ("scheduler", SCHEDULER_NAMES)):
        menu = required[setting][0]
        for name in menu if isinstance(menu, list) else required[setting][1]["options"]:
            if name not in known:
                rows[name] = trials.verdicts({f"6.{setting}": name}, ("ranks",))
    judge(trials.model, rows)
