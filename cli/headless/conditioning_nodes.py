"""ComfyUI's nodes that only rearrange CONDITIONING, under ComfyUI's names and with its behaviour.

CONDITIONING is a list of entries `[tokens [B, S, C], dict]`; what comes in is never changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

CELL = 8
"""Pixels per latent cell, in both directions."""

Conditioning = list[list[Any]]
PROMPT = ("CONDITIONING", {})
SHARE = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0})
STRENGTH = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0})
GUIDANCE = ("FLOAT", {"default": 3.5, "min": 0.0, "max": 100.0})
PLACE = {"width": SHARE, "height": SHARE, "x": SHARE, "y": SHARE}
PIXELS = {
    **{name: ("INT", {"default": 64, "min": 64, "max": 16384}) for name in ("width", "height")},
    **{name: ("INT", {"default": 0, "min": 0, "max": 16384}) for name in ("x", "y")},
}
BOUNDS = ["default", "mask bounds"]
METHODS = ["offset", "index", "uxo/uno"]


class _Node:
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    inputs: ClassVar[dict[str, Any]]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": dict(cls.inputs)}


class SetValues(_Node):
    """Sets keys of every entry: those of `values`, called with the inputs."""

    values: ClassVar[Callable[..., dict[str, Any]]]

    def make(self, conditioning: Conditioning, **inputs: Any) -> tuple[Conditioning]:
        values = type(self).values(**inputs)
        return ([[tokens, {**entry, **values}] for tokens, entry in conditioning],)


class ConditioningCombine(_Node):
    inputs: ClassVar[dict[str, Any]] = {"conditioning_1": PROMPT, "conditioning_2": PROMPT}

    def make(self, conditioning_1: Conditioning, conditioning_2: Conditioning) -> tuple[Conditioning]:
        return (conditioning_1 + conditioning_2,)


class ConditioningConcat(_Node):
    """Puts the tokens of the first entry of one behind those of every entry of the other."""

    inputs: ClassVar[dict[str, Any]] = {"conditioning_to": PROMPT, "conditioning_from": PROMPT}

    def make(self, conditioning_to: Conditioning, conditioning_from: Conditioning) -> tuple[Conditioning]:
        behind = conditioning_from[0][0]
        return ([[torch.cat((tokens, behind), dim=1), dict(entry)] for tokens, entry in conditioning_to],)


class ConditioningAverage(_Node):
    """Weighs every entry of one against the first entry of the other, whose text is cut or filled up with zeros."""

    inputs: ClassVar[dict[str, Any]] = {
        "conditioning_to": PROMPT,
        "conditioning_from": PROMPT,
        "conditioning_to_strength": SHARE,
    }

    def make(
        self, conditioning_to: Conditioning, conditioning_from: Conditioning, conditioning_to_strength: float
    ) -> tuple[Conditioning]:
        other, other_entry = conditioning_from[0]
        share = conditioning_to_strength

        def mean(one: Tensor, two: Tensor) -> Tensor:
            return one * share + two * (1.0 - share)

        made = []
        for tokens, entry in conditioning_to:
            filled = other.new_zeros(len(other), tokens.shape[1], other.shape[2])
            length = min(tokens.shape[1], other.shape[1])
            filled[:, :length] = other[:, :length]
            pooled, pooled_of_other = entry.get("pooled_output"), other_entry.get("pooled_output")
            new = dict(entry)
            if pooled_of_other is not None:
                new["pooled_output"] = mean(pooled_of_other if pooled is None else pooled, pooled_of_other)
            made.append([mean(tokens, filled), new])
        return (made,)


class ConditioningZeroOut(_Node):
    inputs: ClassVar[dict[str, Any]] = {"conditioning": PROMPT}

    def make(self, conditioning: Conditioning) -> tuple[Conditioning]:
        made = []
        for tokens, entry in conditioning:
            pooled = entry.get("pooled_output")
            zeroed = {} if pooled is None else {"pooled_output": torch.zeros_like(pooled)}
            made.append([torch.zeros_like(tokens), {**entry, **zeroed}])
        return (made,)


class ReferenceLatent(_Node):
    """Adds a picture's latent to those that the model looks at."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"conditioning": PROMPT}, "optional": {"latent": ("LATENT", {})}}

    def make(self, conditioning: Conditioning, latent: dict[str, Tensor] | None = None) -> tuple[Conditioning]:
        new = [] if latent is None else [latent["samples"]]
        return (
            [
                [tokens, {**entry, "reference_latents": [*entry.get("reference_latents", ()), *new]} if new else entry]
                for tokens, entry in conditioning
            ],
        )


def _area(width: int, height: int, x: int, y: int, strength: float) -> dict[str, Any]:
    area = tuple(pixels // CELL for pixels in (height, width, y, x))
    return {"area": area, "strength": strength, "set_area_to_bounds": False}


def _area_of_percents(width: float, height: float, x: float, y: float, strength: float) -> dict[str, Any]:
    return {"area": ("percentage", height, width, y, x), "strength": strength, "set_area_to_bounds": False}


def _mask(mask: Tensor, strength: float, set_cond_area: str) -> dict[str, Any]:
    return {
        "mask": mask if mask.ndim > 2 else mask[None],
        "set_area_to_bounds": set_cond_area != BOUNDS[0],
        "mask_strength": strength,
    }


def _references_by(reference_latents_method: str) -> dict[str, Any]:
    return {"reference_latents_method": reference_latents_method.partition("/")[0]}


SETTERS: dict[str, tuple[dict[str, Any], Callable[..., dict[str, Any]]]] = {
    "ConditioningSetArea": ({**PIXELS, "strength": STRENGTH}, _area),
    "ConditioningSetAreaPercentage": ({**PLACE, "strength": STRENGTH}, _area_of_percents),
    "ConditioningSetAreaStrength": ({"strength": STRENGTH}, lambda strength: {"strength": strength}),
    "ConditioningSetMask": ({"mask": ("MASK", {}), "strength": STRENGTH, "set_cond_area": (BOUNDS, {})}, _mask),
    "ConditioningSetTimestepRange": (
        {"start": SHARE, "end": SHARE},
        lambda start, end: {"start_percent": start, "end_percent": end},
    ),
    "FluxGuidance": ({"guidance": GUIDANCE}, lambda guidance: {"guidance": guidance}),
    "FluxDisableGuidance": ({}, lambda: {"guidance": None}),
    "FluxKontextMultiReferenceLatentMethod": ({"reference_latents_method": (METHODS, {})}, _references_by),
}
"""Maps a node's name to its inputs other than the CONDITIONING, and to the function from these to the keys it sets."""

CONDITIONING_NODES: dict[str, type] = {
    **{
        node.__name__: node
        for node in (
            ConditioningCombine,
            ConditioningConcat,
            ConditioningAverage,
            ConditioningZeroOut,
            ReferenceLatent,
        )
    },
    **{
        name: type(name, (SetValues,), {"inputs": {"conditioning": PROMPT, **inputs}, "values": staticmethod(values)})
        for name, (inputs, values) in SETTERS.items()
    },
}
