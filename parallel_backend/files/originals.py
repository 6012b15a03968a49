"""Some weights of a model by their original names, whatever layout and format its file has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..families.spec import Rule, joined
from .checkpoint import Checkpoint, open_checkpoint
from .detect import Detected, detect
from .key_map import COMPANIONS


def read_originals(path: Path, module: str) -> dict[str, Tensor]:
    """The weights of the original model's `module` by their names in it: fp32 copies, since the file may change.

    Raises `UserError` for a file that cannot be read, or has not all of them.
    """
    checkpoint = open_checkpoint(path)
    detected = detect(checkpoint)
    rules = [rule for rule in detected.spec.rules if f"{rule.source}.".startswith(f"{module}.")]
    return {
        joined(rule.source, suffix).removeprefix(f"{module}."): tensor
        for rule in rules
        for suffix, tensor in _tensors(checkpoint, detected, rule)
    }


def _tensors(checkpoint: Checkpoint, detected: Detected, rule: Rule) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a rule's source, by their suffixes."""
    for suffix, target_suffix in rule.suffixes.items():
        names = [joined(rule.source, suffix)]
        if detected.layout == "diffusers":
            names = [joined(target, target_suffix) for target in rule.targets]
        if any(name in detected.shapes for name in names):
            parts = [_plain(checkpoint, detected.prefix + name) for name in names]
            whole = torch.cat(parts)
            is_swapped = rule.swap_halves and detected.layout == "diffusers"
            yield suffix, torch.cat(whole.chunk(2)[::-1]) if is_swapped else whole


def _plain(checkpoint: Checkpoint, key: str) -> Tensor:
    """A tensor as fp32, an fp8 matrix with its scale."""
    tensor = checkpoint.tensor(key).float()
    stem = key.removesuffix(".weight")
    scales = [f"{stem}.{name}" for name in COMPANIONS["weight_scale"] if f"{stem}.{name}" in checkpoint.tensors]
    return tensor * checkpoint.tensor(scales[0]).float() if scales and key.endswith(".weight") else tensor
