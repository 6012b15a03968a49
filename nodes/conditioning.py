"""CONDITIONING as what a request carries, and what it cannot carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..parallel_backend.errors import UserError
from ..parallel_backend.protocol.messages import Conditioning
from .handles import OWN_LOADER

DEFAULT_GUIDANCE = 3.5

REGION = "Use one prompt for the whole picture"
CANNOT_TRAVEL = {
    "area": REGION,
    "mask": REGION,
    "gligen": REGION,
    "hooks": "Remove the hooks",
    "timestep_start": "Use the prompt for the whole run",
    "timestep_end": "Use the prompt for the whole run",
    "attention_mask": "Use a text encoder node that gives no attention mask",
    "reference_latents": "Remove the reference picture",
    "concat_latent_image": "Use a noise mask with a model that is not an inpainting model",
    "concat_mask": "Use a noise mask with a model that is not an inpainting model",
    "noise_concat": "Remove the node that adds latents to the model's input",
    "cross_attn_controlnet": "Remove the ControlNet",
    "aspect_ratio": "Remove it: the picture's own is taken",
    "model_conds": "Remove the node that adds inputs to the model",
    "unclip_conditioning": "Remove the picture prompt",
    "clip_vision_output": "Remove the picture prompt",
}
"""Keys of an entry that would change the picture in ComfyUI, and what to do instead, unless the family takes them."""
IN_KSAMPLER = ("area", "mask", "strength", "hooks", "start_percent", "end_percent", "timestep_start", "timestep_end")
"""What ComfyUI's own samplers do around the model, and so do with the model of Parallel Loader too."""
OWN_SAMPLER = "use KSampler with this model, which does this too."
NEUTRAL = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
"""Keys of an entry that may be there with this value."""

POOLED = {"pooled_output": "pooled"}
MASK = {"attention_mask": "mask"}
MT5 = {"conditioning_mt5xl": "tokens_2", "attention_mask_mt5xl": "mask_2"}


@dataclass(frozen=True)
class Travel:
    """The tensors of an entry that a family's model `needs`, and those that it `takes` when they are there.

    From the entry's keys to the names in the request. `encoders`: those that make such an entry.
    """

    needs: Mapping[str, str]
    encoders: str
    takes: Mapping[str, str] = field(default_factory=dict)


PIXART = Travel({}, "T5-XXL", takes=MASK)
TRAVELS = {
    "flux": Travel(POOLED, "CLIP-L and T5"),
    "sd3": Travel(POOLED, "CLIP-L, CLIP-G and T5"),
    "pixart-alpha": PIXART,
    "pixart-sigma": PIXART,
    "hunyuandit": Travel({**MASK, **MT5}, "Chinese CLIP and mT5"),
}


def travelling(side: str, conditioning: list[Any], family: str) -> tuple[tuple[Conditioning, ...], dict[str, Tensor]]:
    """The message's entries and tensors of one `side` (positive or negative), for a model of `family`.

    Raises `UserError` naming what Parallel Sampler cannot do with it.
    """
    if len(conditioning) != 1:
        raise UserError(
            f"The {side} conditioning has {len(conditioning)} entries; Parallel Sampler takes 1.",
            f"Connect a single prompt, without Conditioning (Combine) or regions, or {OWN_SAMPLER}",
        )
    tokens, entry = conditioning[0]
    travel = TRAVELS[family]
    names = {**travel.needs, **travel.takes}
    for key, advice in CANNOT_TRAVEL.items():
        if entry.get(key) is not None and key not in names:
            raise _refused(side, key, advice, key in IN_KSAMPLER)
    for key, neutral in NEUTRAL.items():
        if entry.get(key, neutral) != neutral:
            raise _refused(side, f"{key}={entry[key]}", f"Set it to {neutral}", key in IN_KSAMPLER)
    for key in travel.needs:
        if entry.get(key) is None:
            raise UserError(
                f"The {side} conditioning has no {key}, which this {family} model needs.",
                f"Use the text encoders that belong to the model ({travel.encoders}).",
            )
    tensors = {f"{side}.0.{name}": entry[key] for key, name in names.items() if entry.get(key) is not None}
    message = Conditioning(
        guidance=entry.get("guidance", DEFAULT_GUIDANCE),
        size=_size(side, entry, ""),
        target_size=_size(side, entry, "target_"),
    )
    return (message,), {f"{side}.0.tokens": tokens, **tensors}


def entry_of(tensors: Mapping[str, Tensor], guidance: float) -> list[Any]:
    """The CONDITIONING of an encoded prompt's `tensors`, under ComfyUI's keys."""
    entry = {key: tensors[name] for key, name in {**POOLED, **MASK, **MT5}.items() if name in tensors}
    return [[tensors["tokens"], {**entry, "guidance": guidance}]]


def _size(side: str, entry: Mapping[str, Any], prefix: str) -> tuple[int, int] | None:
    """What an entry tells the model of the picture's height and width."""
    height, width = (entry.get(f"{prefix}{name}") for name in ("height", "width"))
    if height is None or width is None:
        return None
    if height < 1 or width < 1:
        raise _refused(side, f"{prefix}width={width} and {prefix}height={height}", "Set both to at least 1")
    return height, width


def _refused(side: str, what: str, advice: str, in_ksampler: bool = False) -> UserError:
    return UserError(
        f"The {side} conditioning carries {what}, which Parallel Sampler cannot send to the ranks.",
        f"{advice}, or {OWN_SAMPLER if in_ksampler else OWN_LOADER}",
    )
