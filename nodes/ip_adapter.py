"""Parallel IP-Adapter: a picture as a prompt, in addition to the text."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..parallel_backend.errors import UserError
from ..parallel_backend.files.ip_adapter import IPAdapterInfo, read_ip_adapter
from ..parallel_backend.protocol.messages import ImagePromptUse, IPAdapterRef
from . import host, model_files
from .handles import EncodedPicture, handle_of
from .widgets import SPAN, allowed, check_span

if TYPE_CHECKING:
    from torch import Tensor

KIND = "ipadapter"
WHAT = "The IP-Adapter"
MOST = 100.0
IDLE = "the picture would never be looked at"
"""The error's text for a span without time."""


class ParallelDiTIPAdapter:
    CATEGORY = "ParallelDiT"
    SEARCH_ALIASES = (
        "ip adapter",
        "ipadapter",
        "image prompt",
        "apply ip adapter",
    )
    DESCRIPTION = (
        "Adds a picture to the prompt, through an IP-Adapter in the ranks. Works with Parallel Sampler and with "
        "ComfyUI's own samplers."
    )
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The model with the picture, for another Parallel IP-Adapter or a sampler.",)
    FUNCTION = "show"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "From Parallel Loader or another of our nodes."}),
                "ip_adapter": (
                    model_files.names(KIND),
                    {
                        "tooltip": "A safetensors file in models/ipadapter: XLabs' for Flux.1, or InstantX' for Stable "
                        "Diffusion 3.5."
                    },
                ),
                "clip_vision_output": (
                    "CLIP_VISION_OUTPUT",
                    {
                        "tooltip": "The picture, from CLIP Vision Encode: with CLIP-L (ViT-L/14) for Flux.1, with "
                        "SigLIP (so400m, 384 pixels) for Stable Diffusion 3.5."
                    },
                ),
                "weight": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": -MOST,
                        "max": MOST,
                        "step": 0.01,
                        "tooltip": "How strongly the picture counts. At 0 it is ignored.",
                    },
                ),
                **SPAN,
            },
            "optional": {
                "negative": (
                    "CLIP_VISION_OUTPUT",
                    {
                        "tooltip": "The picture of the negative prompt, such as a black one. Without it: an "
                        "embedding of zeros."
                    },
                )
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, ip_adapter: str, start_percent: float, end_percent: float) -> bool:
        is_there = allowed(lambda name: model_files.resolve(name, (KIND,), WHAT), ip_adapter)
        return is_there and allowed(check_span, start_percent, end_percent, IDLE)

    def show(
        self,
        model: Any,
        ip_adapter: str,
        clip_vision_output: Any,
        weight: float,
        start_percent: float,
        end_percent: float,
        negative: Any = None,
    ) -> tuple[Any]:
        check_span(start_percent, end_percent, IDLE)
        handle = handle_of(model)
        path = model_files.resolve(ip_adapter, (KIND,), WHAT)
        info = read_ip_adapter(path)
        if info.family != handle.family:
            raise UserError(
                f"{path.name} is an IP-Adapter for {info.family} models, and this model is of the family "
                f"{handle.family}.",
                "Choose an IP-Adapter that was trained for the model.",
            )
        positive = _embedding(info, clip_vision_output)
        message = ImagePromptUse(
            adapter=IPAdapterRef(path=str(path)), weight=weight, start=start_percent, end=end_percent
        )
        against = positive.new_zeros(positive.shape) if negative is None else _embedding(info, negative)
        picture = EncodedPicture(message, (positive, against))
        return (host.current().with_handle(model, replace(handle, pictures=(*handle.pictures, picture))),)


def _embedding(info: IPAdapterInfo, output: Any) -> Tensor:
    """What the IP-Adapter takes of a CLIP_VISION_OUTPUT. Raises `UserError` for that of another vision model."""
    name = info.picture
    found = getattr(output, name, None)
    if found is None or found.shape[-1] != info.picture_width:
        given = "none" if found is None else f"a width of {found.shape[-1]}"
        raise UserError(
            f"{info.name} takes {name} of width {info.picture_width}; the vision model gives {given}.",
            "Encode the picture with the vision model that belongs to the IP-Adapter: CLIP-L (ViT-L/14) for Flux.1, "
            "SigLIP (so400m, 384 pixels) for Stable Diffusion 3.5.",
        )
    return found.float().cpu()
