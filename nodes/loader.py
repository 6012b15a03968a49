"""Parallel Loader: names a diffusion transformer for the ranks. They read it when it is first used."""

from __future__ import annotations

from typing import Any, get_args

from ..parallel_backend.files import detect, open_checkpoint
from ..parallel_backend.protocol.messages import ModelRef, WeightDtype
from . import host, model_files
from .handles import ModelHandle
from .layout_choice import LayoutChoice
from .widgets import LAYOUT_INPUT, verdict

KINDS = ("diffusion_models", "checkpoints")
WHAT = "The diffusion model"


class ParallelDiTLoader:
    CATEGORY = "ParallelDiT"
    SEARCH_ALIASES = (
        "load diffusion model",
        "diffusion model loader",
        "unet loader",
        "load unet",
        "load checkpoint",
        "checkpoint loader",
        "load model",
        "multi gpu",
        "multigpu",
        "gpu",
        "distributed",
        "xdit",
        "xfuser",
        "raylight",
        "diffusers",
        "flux loader",
        "sd3 loader",
        "wan loader",
    )
    DESCRIPTION = (
        "Loads a diffusion transformer into the ranks of the sidecar, each of them reading only what it needs."
    )
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("For Parallel Sampler, or for KSampler and the other samplers of ComfyUI.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (
                    model_files.names(*KINDS),
                    {
                        "tooltip": "A safetensors file in models/diffusion_models, models/unet or models/checkpoints, "
                        "or a diffusers pipeline folder in models/diffusers. Of a file with text encoders and a VAE in "
                        "it, the model alone is read."
                    },
                ),
                "weight_dtype": (
                    list(get_args(WeightDtype)),
                    {"default": "auto", "tooltip": "The weights' type in the ranks' memory. auto keeps the file's."},
                ),
            },
            "optional": {"layout": LAYOUT_INPUT},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model: str) -> bool | str:
        return verdict(lambda name: model_files.resolve(name, KINDS, WHAT), model)

    def load(self, model: str, weight_dtype: WeightDtype, layout: LayoutChoice | None = None) -> tuple[Any]:
        path = model_files.resolve(model, KINDS, WHAT)
        detected = detect(open_checkpoint(path))
        ref = ModelRef(path=str(path), weight_dtype=weight_dtype)
        return (host.current().new_model(ModelHandle(ref, layout, detected.family, detected.config)),)
