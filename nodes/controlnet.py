"""Parallel ControlNet Loader and Parallel ControlNet Apply: ControlNets that the ranks evaluate with the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..parallel_backend.errors import UserError
from ..parallel_backend.files.controlnet import read_controlnet
from ..parallel_backend.protocol.messages import ControlNetRef, ControlUse
from . import model_files
from .request.controls import CONTROL, PREPARED, PendingControl, PendingControls, with_control
from .widgets import SPAN, allowed, check_span, verdict

if TYPE_CHECKING:
    from torch import Tensor

KIND = "controlnet"
WHAT = "The ControlNet"
NO_MODE = -1
IDLE = "the ControlNet would never work"
"""The error's text for a span without time."""


class ParallelDiTControlNetLoader:
    CATEGORY = "ParallelDiT"
    SEARCH_ALIASES = (
        "controlnet",
        "load controlnet model",
        "controlnet loader",
    )
    DESCRIPTION = "Names a ControlNet for the ranks. They read it when it is first used."
    RETURN_TYPES = ("PARALLELDIT_CONTROLNET",)
    RETURN_NAMES = ("controlnet",)
    OUTPUT_TOOLTIPS = ("For Parallel ControlNet Apply.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "controlnet": (
                    model_files.names(KIND),
                    {
                        "tooltip": "A safetensors file in models/controlnet: for Flux.1, Stable Diffusion 3 and 3.5, "
                        "or HunyuanDiT."
                    },
                )
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, controlnet: str) -> bool | str:
        return verdict(lambda name: model_files.resolve(name, (KIND,), WHAT), controlnet)

    def load(self, controlnet: str) -> tuple[ControlNetRef]:
        path = model_files.resolve(controlnet, (KIND,), WHAT)
        read_controlnet(path)
        return (ControlNetRef(path=str(path)),)


class ParallelDiTControlNetApply:
    CATEGORY = "ParallelDiT"
    SEARCH_ALIASES = (
        "controlnet",
        "apply controlnet",
        "control net",
    )
    DESCRIPTION = (
        "Adds a ControlNet and its picture to both prompts, for a model of Parallel Loader. Several may follow."
    )
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    OUTPUT_TOOLTIPS = ("The positive prompt with the ControlNet.", "The negative prompt with the ControlNet.")
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "positive": ("CONDITIONING", {"tooltip": "What to show."}),
                "negative": ("CONDITIONING", {"tooltip": "What to avoid."}),
                "controlnet": ("PARALLELDIT_CONTROLNET", {"tooltip": "From Parallel ControlNet Loader."}),
                "image": (
                    "IMAGE",
                    {"tooltip": "The control picture: edges, depth, a pose, as the ControlNet expects."},
                ),
                "strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 10.0,
                        "step": 0.01,
                        "tooltip": "How strongly the picture is followed. At 0 the ControlNet is not evaluated.",
                    },
                ),
                **SPAN,
                "mode": (
                    "INT",
                    {
                        "default": NO_MODE,
                        "advanced": True,
                        "min": NO_MODE,
                        "max": 1000,
                        "tooltip": "The kind of picture, by its number in a union ControlNet. -1 for any other.",
                    },
                ),
            },
            "optional": {
                "vae": (
                    "VAE",
                    {
                        "tooltip": "The model's VAE, from Parallel VAE Loader or ComfyUI's own: encodes the picture. "
                        "Only XLabs' ControlNets for Flux.1 need none."
                    },
                )
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, start_percent: float, end_percent: float) -> bool:
        return allowed(check_span, start_percent, end_percent, IDLE)

    def apply(
        self,
        positive: list[Any],
        negative: list[Any],
        controlnet: ControlNetRef,
        image: Tensor,
        strength: float,
        start_percent: float,
        end_percent: float,
        mode: int,
        vae: Any = None,
    ) -> tuple[list[Any], list[Any]]:
        check_span(start_percent, end_percent, IDLE)
        message = ControlUse(
            net=controlnet,
            strength=strength,
            start=start_percent,
            end=end_percent,
            mode=None if mode == NO_MODE else mode,
        )
        info = read_controlnet(controlnet.path)
        if vae is None and not info.takes_pixels:
            raise UserError(f"{info.name} takes the latent of its picture.", "Connect the model's VAE.")
        prepare = PREPARED.get(info.picture_type, lambda picture: picture)
        control = PendingControl(message, prepare(image[..., :3]), None if info.takes_pixels else vae)
        # ComfyUI's samplers evaluate prompts together that share this very object.
        shared: dict[int, PendingControls] = {}

        def added(conditioning: Sequence[Any]) -> list[Any]:
            return [
                [tokens, {**entry, CONTROL: shared.setdefault(id(entry.get(CONTROL)), with_control(entry, control))}]
                for tokens, entry in conditioning
            ]

        return added(positive), added(negative)
