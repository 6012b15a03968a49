"""CONDITIONING as what a request carries, and what it cannot carry."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..parallel_backend.errors import UserError
from ..parallel_backend.protocol.messages import Conditioning

DEFAULT_GUIDANCE = 3.5

REGION = "Use one prompt for the whole picture"
CANNOT_TRAVEL = {
    "area": REGION,
    "mask": REGION,
    "gligen": REGION,
    "control": "Remove the ControlNet",
    "hooks": "Remove the hooks",
    "timestep_start": "Use the prompt for the whole run",
    "timestep_end": "Use the prompt for the whole run",
    "attention_mask": "Use a text encoder node that gives no attention mask",
    "reference_latents": "Remove the reference picture",
    "concat_latent_image": "Use a noise mask with a model that is not an inpainting model",
    "concat_mask": "Use a noise mask with a model that is not an inpainting model",
    "noise_concat": "Remove the node that adds latents to the model's input",
    "cross_attn_controlnet": "Remove the ControlNet",
    "model_conds": "Remove the node that adds inputs to the model",
    "unclip_conditioning": "Remove the picture prompt",
    "clip_vision_output": "Remove the picture prompt",
}
"""Keys of an entry that would change the picture in ComfyUI, and what to do instead."""
NEUTRAL = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
"""Keys of an entry that may be there with this value."""


def travelling(side: str, conditioning: list[Any]) -> tuple[tuple[Conditioning, ...], dict[str, Tensor]]:
    """The message's entries and tensors of one `side` (positive or negative).

    Raises `UserError` naming what Parallel Sampler cannot do with it.
    """
    if len(conditioning) != 1:
        raise UserError(
            f"The {side} conditioning has {len(conditioning)} entries; Parallel Sampler takes 1.",
            "Connect a single prompt, without Conditioning (Combine) or regions.",
        )
    tokens, entry = conditioning[0]
    for key, advice in CANNOT_TRAVEL.items():
        if entry.get(key) is not None:
            raise _refused(side, key, advice)
    for key, neutral in NEUTRAL.items():
        if entry.get(key, neutral) != neutral:
            raise _refused(side, f"{key}={entry[key]}", f"Set it to {neutral}")
    if entry.get("pooled_output") is None:
        raise UserError(
            f"The {side} conditioning has no pooled output, which this model needs.",
            "Use the text encoders that belong to the model (Flux: CLIP-L and T5; SD3: CLIP-L, CLIP-G and T5).",
        )
    tensors = {f"{side}.0.tokens": tokens, f"{side}.0.pooled": entry["pooled_output"]}
    return (Conditioning(guidance=entry.get("guidance", DEFAULT_GUIDANCE)),), tensors


def _refused(side: str, what: str, advice: str) -> UserError:
    return UserError(
        f"The {side} conditioning carries {what}, which Parallel Sampler cannot send to the ranks.",
        f"{advice}, or sample with ComfyUI's own loader and KSampler.",
    )
