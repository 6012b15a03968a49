"""Training state on disk: safetensors for tensors, JSON for the rest, replaced atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CACHE = Path(__file__).parent / ".cache"
TARGET = Path(__file__).parents[2] / "demo_model" / "flux-tiny"
"""Where the exported diffusers folder lies."""
TENSORS, META = "state.safetensors", "meta.json"


def write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def save(folder: Path, parts: dict[str, dict[str, torch.Tensor]], meta: dict[str, Any]) -> None:
    """Write named groups of tensors as one file, then the JSON that says which step they are of."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = {
        f"{part}/{key}": tensor.detach().clone().contiguous() for part, d in parts.items() for key, tensor in d.items()
    }
    partial = folder / (TENSORS + ".partial")
    save_file(flat, partial, metadata={"meta": json.dumps(meta)})
    os.replace(partial, folder / TENSORS)
    write_json(folder / META, meta)


def load(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]] | None:
    """The newest saved state and its meta, or None where nothing was saved yet."""
    path = folder / TENSORS
    if not path.exists():
        return None
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(path).items():
        part, key = name.split("/", 1)
        parts.setdefault(part, {})[key] = tensor
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return parts, json.loads(header["__metadata__"]["meta"])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's per-parameter state as flat tensors, named `index.key`."""
    return {
        f"{index}.{key}": torch.as_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
