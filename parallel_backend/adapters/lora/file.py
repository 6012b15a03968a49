"""LoRA files, by whichever program wrote them: the changes that they hold, under the model's own names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...files.checkpoint import Checkpoint
from ...files.lora_kinds import refusal, unread_kind
from ...files.recognise import refuse_others
from .change import Change, changes_of
from .module_names import BIAS, WEIGHT, Names

ENDINGS = {
    ".lora_up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_mid.weight": "mid",
    ".lora_B.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora.up.weight": "up",
    ".lora.down.weight": "down",
    "_lora.up.weight": "up",
    "_lora.down.weight": "down",
    ".up.weight": "up",
    ".down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_B": "up",
    ".lora_A": "down",
    ".lora_B.bias": "bias",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".hada_w1_a": "w1_a",
    ".hada_w1_b": "w1_b",
    ".hada_w2_a": "w2_a",
    ".hada_w2_b": "w2_b",
    ".hada_t1": "t1",
    ".hada_t2": "t2",
    ".lokr_w1": "kron_1",
    ".lokr_w2": "kron_2",
    ".lokr_w1_a": "kron_1_a",
    ".lokr_w1_b": "kron_1_b",
    ".lokr_w2_a": "kron_2_a",
    ".lokr_w2_b": "kron_2_b",
    ".lokr_t2": "kron_t2",
    ".diff": "diff",
    ".w_norm": "diff",
    ".diff_b": "bias",
    ".b_norm": "bias",
}
"""How the names of a file's tensors end, and what such a tensor is: a role of a change, or the change of a bias."""
BY_LENGTH = sorted(ENDINGS, key=len, reverse=True)
FOR_TEXT = re.compile(r"(lora_te\d?_|lora_prior_te|text_encoder|text_encoders\.|te\d?\.|t5xxl\.|clip_[lgh]\.)")
METADATA = "lora_adapter_metadata"
"""Where diffusers writes how PEFT trained a LoRA."""


@dataclass(frozen=True)
class LoraFile:
    """`changes` of the model. `strange`: the keys that mean nothing to it; `for_text`: those of text encoders."""

    changes: tuple[Change, ...]
    strange: tuple[str, ...]
    for_text: tuple[str, ...]
    total: int
    """Of the file's keys."""


def read_lora(checkpoint: Checkpoint, names: Names) -> LoraFile:
    """The changes in a file. Raises `UserError` for one that has none for this model, or broken ones."""
    if kind := unread_kind(checkpoint.tensors):
        raise refusal(checkpoint.source.name, kind)
    modules: dict[str, dict[str, Tensor]] = {}
    strange, for_text = [], []
    for key in sorted(checkpoint.tensors):
        endings = (each for each in BY_LENGTH if key.endswith(each) and key.removesuffix(each) in names)
        if ending := next(endings, None):
            modules.setdefault(key.removesuffix(ending), {})[ENDINGS[ending]] = checkpoint.tensor(key)
        else:
            (for_text if FOR_TEXT.match(key) else strange).append(key)
    try:
        scale_of = _trained_scale(checkpoint.metadata)
    except UserError as error:
        raise UserError(f"{checkpoint.source.name}: {error.message}", error.hint) from error
    changes: list[Change] = []
    for module, parts in modules.items():
        bias = parts.pop("bias", None)
        try:
            if parts:
                if "down" in parts and "alpha" not in parts and (alpha := scale_of(module, len(parts["down"]))):
                    parts["alpha"] = torch.tensor(alpha)
                changes += changes_of(names.places(module, WEIGHT), parts)
            if bias is not None:
                scale = float(parts["alpha"]) / len(parts["down"]) if {"alpha", "down"} <= parts.keys() else 1.0
                changes += changes_of(names.places(module, BIAS), {"diff": scale * bias.float()})
        except UserError as error:
            raise UserError(f"{checkpoint.source.name}, {module}: {error.message}", error.hint) from error
    if not changes and for_text and not strange:
        raise UserError(
            f"{checkpoint.source.name} is for text encoders alone: all of its {len(for_text)} tensors are of them.",
            "Load it with ComfyUI's own Load LoRA, its CLIP connected; the model needs no Parallel LoRA of it.",
        )
    if not changes:
        refuse_others(checkpoint, "a LoRA")
        raise UserError(
            f"{checkpoint.source.name} changes nothing in this model: none of its {len(checkpoint.tensors)} tensors "
            f"({', '.join((strange or for_text)[:3])} …) is of a module that the model has.",
            "Choose a LoRA that was trained for this kind of model.",
        )
    return LoraFile(tuple(changes), tuple(strange), tuple(for_text), len(checkpoint.tensors))


def _trained_scale(metadata: Mapping[str, str]) -> Any:
    """`alpha(module, rank)` as a file's metadata give it: None where they do not, as for a scale of 1.

    Raises `UserError` for metadata that cannot be read: at a scale of 1 the LoRA would be too strong or too weak.
    """
    try:
        found = json.loads(metadata.get(METADATA, "{}"))
    except ValueError as error:
        raise _unread("is not valid JSON") from error
    if not isinstance(found, dict):
        raise _unread("is not a JSON object")
    prefix = "transformer."
    config = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}

    def alpha(module: str, rank: int) -> float | None:
        patterns = config.get("alpha_pattern") or {}
        name = module.removeprefix(prefix)
        value = next((each for key, each in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), None)
        value = config.get("lora_alpha") if value is None else value
        if value is None:
            return None
        if not isinstance(value, int | float):
            raise _unread(f"says lora_alpha={value!r}, which is no number")
        return value * math.sqrt(rank) if config.get("use_rslora") else float(value)

    return alpha


def _unread(what: str) -> UserError:
    return UserError(f"Its {METADATA} {what}.", "Download or save the LoRA again.")
