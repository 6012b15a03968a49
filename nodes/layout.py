"""Parallel Layout: how the ranks share the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from ..parallel_backend.errors import UserError
from ..parallel_backend.layout import AXES, AttentionKernel, Layout, check_ranks, largest_exact_layout, layouts_of
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
        settings = ("attention", "num_patches", "warmup_steps")
        return best.model_copy(update={name: getattr(self, name) for name in settings})

    def check(self, ranks: int) -> None:
        self._candidates(ranks)

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
            for layout in layouts_of(ranks, self.pipefusion_degree)
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
    ) -> bool | str:
        degrees = (ulysses_degree, ring_degree, cfg_degree, data_degree)
        return verdict(_choose, ranks, *degrees, "auto", pipefusion_degree, num_patches, warmup_steps)

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
    ) -> tuple[LayoutChoice]:
        degrees = (ulysses_degree, ring_degree, cfg_degree, data_degree)
        return (_choose(ranks, *degrees, attention, pipefusion_degree, num_patches, warmup_steps),)


def _choose(
    ranks: int,
    ulysses: int,
    ring: int,
    cfg: int,
    data: int,
    attention: AttentionKernel = "auto",
    pipefusion: int = 1,
    patches: int = 0,
    warmup: int = 1,
) -> LayoutChoice:
    """The choice, once it is known to fit the ranks that a sidecar would have."""
    negative = [number for number in (ranks, ulysses, ring, cfg, data, patches) if number < 0]
    if negative:
        raise UserError(f"A layout cannot have a number of {negative[0]}.", "Use 0 to have it chosen.")
    for name, number in (("pipefusion_degree", pipefusion), ("warmup_steps", warmup)):
        if number < 1:
            raise UserError(f"{name}={number}, but it is at least 1.", f"Set {name} to 1 or more.")
    choice = LayoutChoice(ranks, ulysses, ring, cfg, data, attention, pipefusion, patches, warmup)
    known = session.ranks_for(ranks)
    if known:
        choice.check(known)
    return choice
