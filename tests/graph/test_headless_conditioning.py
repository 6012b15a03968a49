"""ComfyUI's nodes around CONDITIONING in the headless runner: what they make, and that it reaches the ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from paralleldit import NODE_CLASS_MAPPINGS
from paralleldit.cli.headless.conditioning_nodes import CONDITIONING_NODES
from paralleldit.cli.headless.core_nodes import Folders, core_nodes
from paralleldit.cli.headless.runner import begin_workflow
from paralleldit.parallel_backend.protocol import messages
from paralleldit.tests.graph.sampling import NAME

PACK = Path(__file__).resolve().parents[2]
MASK, PICTURE = torch.ones(1, 8, 8), torch.ones(1, 16, 4, 4)


def prompt(value: float, length: int = 3, **entry: Any) -> list[Any]:
    return [[torch.full((1, length, 2), value), {"pooled_output": torch.full((1, 2), value), **entry}]]


def made(name: str, *args: Any, **inputs: Any) -> list[Any]:
    node = CONDITIONING_NODES[name]
    return getattr(node(), node.FUNCTION)(*args, **inputs)[0]


@pytest.mark.parametrize(
    ("name", "inputs", "keys"),
    [
        ("FluxGuidance", {"guidance": 2.0}, {"guidance": 2.0}),
        ("FluxDisableGuidance", {}, {"guidance": None}),
        ("ConditioningSetAreaStrength", {"strength": 0.3}, {"strength": 0.3}),
        ("ConditioningSetTimestepRange", {"start": 0.1, "end": 0.6}, {"start_percent": 0.1, "end_percent": 0.6}),
        (
            "ConditioningSetArea",
            {"width": 64, "height": 80, "x": 8, "y": 20, "strength": 0.5},
            {"area": (10, 8, 2, 1), "strength": 0.5, "set_area_to_bounds": False},
        ),
        (
            "ConditioningSetAreaPercentage",
            {"width": 0.4, "height": 0.3, "x": 0.2, "y": 0.1, "strength": 1.0},
            {"area": ("percentage", 0.3, 0.4, 0.1, 0.2), "strength": 1.0, "set_area_to_bounds": False},
        ),
        (
            "ConditioningSetMask",
            {"mask": MASK, "strength": 2.0, "set_cond_area": "mask bounds"},
            {"mask": MASK, "mask_strength": 2.0, "set_area_to_bounds": True},
        ),
        (
            "FluxKontextMultiReferenceLatentMethod",
            {"reference_latents_method": "uxo/uno"},
            {"reference_latents_method": "uxo"},
        ),
    ],
)
def test_a_node_that_sets_values_leaves_its_input_alone(name, inputs, keys):
    before = prompt(1.0)
    (tokens, entry), *_ = made(name, before, **inputs)
    assert tokens is before[0][0]
    assert {key: entry[key] for key in keys} == keys
    assert set(before[0][1]) == {"pooled_output"}
    assert set(CONDITIONING_NODES[name].INPUT_TYPES()["required"]) == {"conditioning", *inputs}


def test_prompts_are_combined_joined_and_averaged():
    one, two = prompt(1.0), prompt(3.0, length=2)
    assert made("ConditioningCombine", one, two) == [*one, *two]
    assert made("ConditioningConcat", one, two)[0][0][0, :, 0].tolist() == [1, 1, 1, 3, 3]
    (tokens, entry), *_ = made("ConditioningAverage", one, two, 0.75)
    assert tokens[0, :, 0].tolist() == [1.5, 1.5, 0.75]
    assert entry["pooled_output"].tolist() == [[1.5, 1.5]]
    (tokens, entry), *_ = made("ConditioningZeroOut", one)
    assert (tokens.abs().sum(), entry["pooled_output"].abs().sum()) == (0, 0)


def test_reference_latents_follow_one_another():
    before = prompt(1.0)
    once = made("ReferenceLatent", before, {"samples": PICTURE})
    twice = made("ReferenceLatent", once, latent={"samples": 2 * PICTURE})
    assert [float(each.mean()) for each in twice[0][1]["reference_latents"]] == [1.0, 2.0]
    assert len(once[0][1]["reference_latents"]) == 1
    assert "reference_latents" not in made("ReferenceLatent", before)[0][1]


def test_a_workflow_of_regions_reaches_the_ranks(client, tmp_path):
    api = json.loads((PACK / "workflows" / "api" / "demo_txt2img.api.json").read_text())
    for key, name in (("2", "model"), ("3", "text_encoders"), ("4", "text_encoders"), ("7", "vae")):
        api[key]["inputs"][name] = NAME
    place = {"width": 64, "height": 64, "x": 64, "y": 0, "strength": 0.8}
    api["20"] = {"class_type": "ConditioningSetArea", "inputs": {"conditioning": ["3", 0], **place}}
    api["21"] = {
        "class_type": "ConditioningCombine",
        "inputs": {"conditioning_1": ["3", 0], "conditioning_2": ["20", 0]},
    }
    api["6"]["inputs"]["positive"] = ["21", 0]
    known = {**core_nodes(Folders(tmp_path, tmp_path, tmp_path)), **NODE_CLASS_MAPPINGS}
    begin_workflow(api, classes=known).finish()
    whole, area = client.last(messages.Sample)[0].positive
    assert (whole.area, area.area, area.strength, area.prompt) == (None, (8, 8, 0, 8), 0.8, 0)
