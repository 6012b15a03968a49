"""Parallel Layout: how the ranks share the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from ..parallel_backend.errors import UserError
from ..parallel_backend.layout import (
    AXES,
    AttentionKernel,
    Layout,
    Weights,
    check_ranks,
    check_weights,
    largest_exact_layout,
    layouts_of,
)
from . import session
from .validation import verdict

MAX_DEGREE = 1024


@dataclass(frozen=True)
class LayoutChoice:
    """What the graph asks for. `ranks` 0 means all GPUs, or two ranks on CPU; a degree of 0 is chosen at the run."""

    ranks: int = 0
    ulysses_degree: int = 0
    ring_degree: int = 0
    cfg_degree: int = 0
    data_degree: int = 0
    attention: AttentionKernel = "auto"
    pipefusion_degree: int = 1
    num_patches: int = 0
    warmup_steps: int = 1
    tensor_degree: int = 1
    weights: Weights = "whole"

    @property
    def chosen(self) -> dict[str, Any]:
        degrees = {f"{axis}_degree": getattr(self, f"{axis}_degree") for axis in AXES}
        return {name: degree for name, degree in degrees.items() if degree}

    def resolve(self, ranks: int, *, batch: int, guided: bool) -> Layout:
        """The layout for a run on `ranks` ranks. Raises `UserError` when the chosen degrees do not fit them."""
        candidates = self._candidates(ranks)
        best = largest_exact_layout(ranks, batch=batch, guided=guided)
        if best not in candidates:
            candidates = [layout for layout in candidates if guided or layout.cfg_degree == 1] or candidates
            best = max(candidates, key=lambda layout: (-layout.data_degree, layout.cfg_degree, layout.ulysses_degree))
        settings = ("attention", "num_patches", "warmup_steps", "weights")
        layout = best.model_copy(update={name: getattr(self, name) for name in settings})
        check_weights(layout)
        return layout

    def check(self, ranks: int) -> None:
        """Raise `UserError` when no layout of `ranks` ranks has the chosen degrees."""
        check_weights(self._candidates(ranks)[0].model_copy(update={"weights": self.weights}))

    def _candidates(self, ranks: int) -> list[Layout]:
        if self.cfg_degree > 2:
            raise UserError(
                f"cfg_degree={self.cfg_degree}, but there are only 2 halves to spread: positive and negative.",
                "Use cfg_degree 1 or 2.",
            )
        if len(self.chosen) == len(AXES):
            check_ranks(Layout(**self.chosen), ranks)
        fitting = [
            layout
            for layout in layouts_of(ranks, self.pipefusion_degree, self.tensor_degree)
            if all(getattr(layout, name) == degree for name, degree in self.chosen.items())
        ]
        if not fitting:
            named = " x ".join(f"{name}={degree}" for name, degree in self.chosen.items() if degree > 1)
            raise UserError(
                f"The layout's {named} cannot be completed to {ranks} ranks.",
                f"Choose degrees whose product divides {ranks}, or set them to 0 to have them chosen.",
            )
        return fitting


class ParallelDiTLayout:
    CATEGORY = "ParallelDiT"
    DESCRIPTION = "How the ranks share one run. The product of all degrees is the number of ranks; 0 chooses."
    RETURN_TYPES = ("PARALLELDIT_LAYOUT",)
    RETURN_NAMES = ("layout",)
    OUTPUT_TOOLTIPS = ("For the layout input of the parallel loaders.",)
    FUNCTION = "build"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def degree(maximum: int, tooltip: str) -> tuple[str, dict[str, Any]]:
            return "INT", {"default": 0, "min": 0, "max": maximum, "tooltip": f"{tooltip} 0 chooses."}

        return {
            "required": {
                "ranks": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": MAX_DEGREE,
                        "tooltip": "Processes that work on a picture, one per GPU. 0: all GPUs, or 2 on a machine "
                        "without GPU.",
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
                "data_degree": degree(MAX_DEGREE, "Replicas among which the pictures of a batch are divided."),
                "attention": (
                    list(get_args(AttentionKernel)),
                    {
                        "default": "auto",
                        "tooltip": "The attention kernel of the ranks. auto is PyTorch's own (sdpa).",
                    },
                ),
            },
            "optional": {
                "pipefusion_degree": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": MAX_DEGREE,
                        "tooltip": "Stages of blocks through which strips of the picture travel (PipeFusion). Sends "
                        "least and divides the model's memory, but approximates. 1: none.",
                    },
                ),
                "num_patches": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": MAX_DEGREE,
                        "tooltip": "Strips that PipeFusion cuts the picture into. 0: two per stage.",
                    },
                ),
                "warmup_steps": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": 10_000,
                        "tooltip": "Exact steps before PipeFusion begins to use what it has from the step before.",
                    },
                ),
                "tensor_degree": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": MAX_DEGREE,
                        "tooltip": "Ranks that each hold and compute a part of every layer (tensor parallel). Divides "
                        "the model's memory, and needs the fastest links. 1: none.",
                    },
                ),
                "weights": (
                    list(get_args(Weights)),
                    {
                        "default": "whole",
                        "tooltip": "What a rank keeps of a block between two uses: all of it, a share that is "
                        "gathered from all ranks ahead of use, or such a share in host memory.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        ranks: int,
        ulysses_degree: int,
        ring_degree: int,
        cfg_degree: int,
        data_degree: int,
        pipefusion_degree: int = 1,
        num_patches: int = 0,
        warmup_steps: int = 1,
        tensor_degree: int = 1,
        weights: Weights = "whole",
    ) -> bool | str:
        degrees = (ranks, ulysses_degree, ring_degree, cfg_degree, data_degree)
        return verdict(_choose, *degrees, "auto", pipefusion_degree, num_patches, warmup_steps, tensor_degree, weights)

    def build(
        self,
        ranks: int,
        ulysses_degree: int,
        ring_degree: int,
        cfg_degree: int,
        data_degree: int,
        attention: AttentionKernel,
        pipefusion_degree: int = 1,
        num_patches: int = 0,
        warmup_steps: int = 1,
        tensor_degree: int = 1,
        weights: Weights = "whole",
    ) -> tuple[LayoutChoice]:
        degrees = (ranks, ulysses_degree, ring_degree, cfg_degree, data_degree)
        pipeline = (pipefusion_degree, num_patches, warmup_steps)
        return (_choose(*degrees, attention, *pipeline, tensor_degree, weights),)


def _choose(*inputs: Any) -> LayoutChoice:
    """The choice of these fields, once it is known to fit the ranks that a sidecar would have."""
    choice = LayoutChoice(*inputs)
    if choice.weights not in get_args(Weights):
        raise UserError(f"weights={choice.weights!r} is unknown.", f"Choose one of {', '.join(get_args(Weights))}.")
    for name, number in vars(choice).items():
        least = int(name in ("pipefusion_degree", "warmup_steps", "tensor_degree"))
        if isinstance(number, int) and number < least:
            raise UserError(
                f"{name}={number}, but it is at least {least}.",
                "Use 0 to have it chosen." if least == 0 else f"Set {name} to 1 or more.",
            )
    known = session.ranks_for(choice.ranks)
    if known:
        choice.check(known)
    return choice
