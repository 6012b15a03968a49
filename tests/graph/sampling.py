"""What tests of the nodes sample with: a node by its short name, a prompt, a model, a call of Parallel Sampler."""

from __future__ import annotations

from typing import Any

import torch
from paralleldit import NODE_CLASS_MAPPINGS
from paralleldit.nodes.layout_choice import LayoutChoice

NAME = "diffusers/tiny"


def node(name: str) -> Any:
    return NODE_CLASS_MAPPINGS[f"ParallelDiT{name}"]()


def conditioning(**entry: Any) -> list[Any]:
    return [[torch.ones(1, 4, 8), {"pooled_output": torch.ones(1, 6), **entry}]]


def load(layout: LayoutChoice | None = None) -> Any:
    return node("Loader").load(NAME, "auto", layout)[0]


def sample(model: Any = None, **changes: Any) -> dict[str, Any]:
    inputs = {
        "model": model or load(),
        "seed": 7,
        "steps": 3,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": conditioning(),
        "latent_image": {"samples": torch.zeros(1, 16, 4, 4)},
        "denoise": 1.0,
    }
    return node("Sampler").sample(**(inputs | changes))[0]
