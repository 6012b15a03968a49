"""Parallel LoRA: a LoRA file that the ranks read themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..parallel_backend.errors import UserError
from ..parallel_backend.files import open_checkpoint
from ..parallel_backend.files.lora_kinds import refusal, unread_kind
from ..parallel_backend.protocol.messages import LoraRef
from . import host, model_files
from .handles import handle_of
from .widgets import allowed

KIND = "loras"
WHAT = "The LoRA"
MOST = 100.0


class ParallelDiTLora:
    CATEGORY = "ParallelDiT"
    SEARCH_ALIASES = (
        "load lora",
        "lora loader",
        "lokr",
        "loha",
        "dora",
        "raylight",
    )
    DESCRIPTION = (
        "Adds a LoRA to the model in the ranks. Changing it or its strength reloads nothing. ComfyUI's own Load "
        "LoRA nodes work on the same MODEL too."
    )
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The model with the LoRA, for another Parallel LoRA or a sampler.",)
    FUNCTION = "add"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "From Parallel Loader or another Parallel LoRA."}),
                "lora": (
                    model_files.names(KIND),
                    {"tooltip": "A safetensors file in models/loras: kohya, diffusers/PEFT, LoHa, LoKr or DoRA."},
                ),
                "strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": -MOST,
                        "max": MOST,
                        "step": 0.01,
                        "tooltip": "How strongly it changes the model. Below 0 it does the opposite, at 0 nothing.",
                    },
                ),
            },
            "optional": {
                "block_strengths": (
                    "STRING",
                    {
                        "default": "",
                        "advanced": True,
                        "tooltip": "Factors of the strength with commas between them, one for each of the model's "
                        "blocks from first to last. Empty: the same for all.",
                    },
                )
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora: str, block_strengths: str = "") -> bool:
        return allowed(lambda name: model_files.resolve(name, (KIND,), WHAT), lora) and allowed(
            _factors, block_strengths
        )

    def add(self, model: Any, lora: str, strength: float, block_strengths: str = "") -> tuple[Any]:
        handle = handle_of(model)
        path = model_files.resolve(lora, (KIND,), WHAT)
        if kind := unread_kind(open_checkpoint(path).tensors):
            raise refusal(path.name, kind)
        ref = LoraRef(path=str(path), strength=strength, block_strengths=_factors(block_strengths))
        return (host.current().with_handle(model, replace(handle, loras=(*handle.loras, ref))),)


def _factors(text: str) -> tuple[float, ...]:
    try:
        factors = tuple(float(part) for part in text.split(",")) if text.strip() else ()
    except ValueError as error:
        raise UserError(f"block_strengths={text!r} is no list of numbers.", "Write them like 1, 1, 0.5, 0.") from error
    beyond = [factor for factor in factors if not -MOST <= factor <= MOST]
    if beyond:
        raise UserError(f"block_strengths holds {beyond[0]:g}.", f"Use numbers from {-MOST:g} to {MOST:g}.")
    return factors
