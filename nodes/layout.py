"""Parallel Layout: how the ranks share the work."""

from __future__ import annotations

from typing import Any, get_args

from ..parallel_backend.errors import UserError
from ..parallel_backend.layout.layout import (
    MAX_DEGREE,
    AttentionKernel,
    Compile,
    Refresh,
    Weights,
)
from .layout_choice import GIVEN, LayoutChoice
from .session import session
from .widgets import allowed

CHOICES = {
    "attention": get_args(AttentionKernel),
    "weights": get_args(Weights),
    "refresh": get_args(Refresh),
    "compile": get_args(Compile),
}


class ParallelDiTLayout:
    CATEGORY = "ParallelDiT"
    SEARCH_ALIASES = (
        "multi gpu",
        "multigpu",
        "gpu",
        "parallel",
        "usp",
        "ulysses",
        "ring attention",
        "sequence parallel",
        "tensor parallel",
        "cfg parallel",
        "data parallel",
        "pipefusion",
        "distrifusion",
        "xdit",
        "xfuser",
        "raylight",
        "distributed",
        "fsdp",
        "offload",
        "attention backend",
        "torch compile",
    )
    DESCRIPTION = "How the ranks share one run. The product of all degrees is the number of ranks; 0 chooses."
    RETURN_TYPES = ("PARALLELDIT_LAYOUT",)
    RETURN_NAMES = ("layout",)
    OUTPUT_TOOLTIPS = ("For the layout input of the parallel loaders.",)
    FUNCTION = "build"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def degree(maximum: int, tooltip: str, **options: Any) -> tuple[str, dict[str, Any]]:
            return "INT", {"default": 0, "min": 0, "max": maximum, "tooltip": f"{tooltip} 0 chooses.", **options}

        def given(tooltip: str, **options: Any) -> tuple[str, dict[str, Any]]:
            return "INT", {"default": 1, "min": 1, "max": MAX_DEGREE, "tooltip": f"{tooltip} 1: none.", **options}

        return {
            "required": {
                "ranks": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": MAX_DEGREE,
                        "tooltip": "Processes that work on a picture, one per GPU. 0: as many as ComfyUI's settings "
                        "say; at first all GPUs, or 2 on a machine without GPU.",
                    },
                ),
                "ulysses_degree": degree(
                    MAX_DEGREE,
                    "Ranks that share the tokens and exchange attention heads (Ulysses). Best within one machine.",
                ),
                "ring_degree": degree(
                    MAX_DEGREE, "Ranks that share the tokens and pass keys and values around (ring attention)."
                ),
                "cfg_degree": degree(2, "2 evaluates the positive and the negative prompt at the same time."),
                "data_degree": degree(
                    MAX_DEGREE, "Replicas among which the pictures of a batch are divided.", advanced=True
                ),
                "attention": (
                    list(get_args(AttentionKernel)),
                    {
                        "default": "auto",
                        "advanced": True,
                        "tooltip": "The attention kernel of the ranks. auto is the fastest that works on the GPU, else "
                        "PyTorch's own (sdpa).",
                    },
                ),
            },
            "optional": {
                "pipefusion_degree": given(
                    "Stages of blocks through which strips of the picture travel (PipeFusion). Sends least and divides "
                    "the model's memory, but approximates."
                ),
                "num_patches": (
                    "INT",
                    {
                        "default": 0,
                        "advanced": True,
                        "min": 0,
                        "max": MAX_DEGREE,
                        "tooltip": "Strips that PipeFusion cuts the picture into. 0: two per stage.",
                    },
                ),
                "warmup_steps": (
                    "INT",
                    {
                        "default": 1,
                        "advanced": True,
                        "min": 0,
                        "max": 10_000,
                        "tooltip": "Exact steps before PipeFusion or DistriFusion begins to use what is one step old.",
                    },
                ),
                "tensor_degree": given(
                    "Ranks that each hold and compute a part of every layer (tensor parallel). Divides the model's "
                    "memory, and needs the fastest links."
                ),
                "weights": (
                    list(get_args(Weights)),
                    {
                        "default": "whole",
                        "tooltip": "What a rank keeps of a block between two uses: all of it, a share that is "
                        "gathered from all ranks ahead of use, or such a share in host memory.",
                    },
                ),
                "distrifusion_degree": given(
                    "Ranks that share the tokens and use each other's keys and values of the step before "
                    "(DistriFusion). Nothing waits for a link, but it approximates.",
                    advanced=True,
                ),
                "refresh": (
                    list(get_args(Refresh)),
                    {
                        "default": "all",
                        "advanced": True,
                        "tooltip": "With DistriFusion: all ranks send their keys and values each step, or one rank a "
                        "step in its turn, which sends less and approximates more.",
                    },
                ),
                "stage_blocks": (
                    "STRING",
                    {
                        "default": "",
                        "advanced": True,
                        "tooltip": "With PipeFusion: how many blocks each stage has, as in 10,9. even: equal numbers, "
                        "the fastest for Flux.1. Empty: so many that the fullest stage has as few parameters as "
                        "possible.",
                    },
                ),
                "compile": (
                    list(get_args(Compile)),
                    {
                        "default": "off",
                        "advanced": True,
                        "tooltip": "blocks: computes with blocks compiled by torch.compile. The first steps of each "
                        "new size take longer. Not under LoHa, LoKr or DoRA.",
                    },
                ),
                "devices": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "The GPUs that the ranks take, by the numbers that torch gives them, as in 0,1: "
                        "one rank on each. Empty: the first ones.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, **inputs: Any) -> bool:
        return allowed(lambda *_: _choose(inputs), *inputs.values())

    def build(self, **inputs: Any) -> tuple[LayoutChoice]:
        return (_choose(inputs),)


def _choose(inputs: dict[str, Any]) -> LayoutChoice:
    """The choice of these inputs, once it is known to fit the ranks that a sidecar would have."""
    choice = LayoutChoice(**inputs)
    for name, known in CHOICES.items():
        if getattr(choice, name) not in known:
            raise UserError(f"{name}={getattr(choice, name)!r} is unknown.", f"Choose one of {', '.join(known)}.")
    for name, number in vars(choice).items():
        least = int(name in GIVEN)
        if isinstance(number, int) and number < least:
            raise UserError(
                f"{name}={number}, but it is at least {least}.",
                "Use 0 to have it chosen." if least == 0 else f"Set {name} to 1 or more.",
            )
    choice.blocks_by_stage()
    ranks = session.ranks_for(choice)
    if ranks:
        choice.check(ranks)
    return choice
