"""The values of the layout's widgets, and the layout that they give for a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..launcher.devices import gpus_of
from ..parallel_backend.errors import UserError
from ..parallel_backend.layout.fitting import check_layout
from ..parallel_backend.layout.layout import (
    AXES,
    AttentionKernel,
    Compile,
    Layout,
    Refresh,
    StageBlocks,
    Weights,
    largest_exact_layout,
    layouts_of,
)
from ..parallel_backend.layout.rules import RunFacts

GIVEN = ("tensor_degree", "distrifusion_degree", "pipefusion_degree")
"""Degrees that are never chosen for the user: they approximate, or depend on the links."""


@dataclass(frozen=True)
class LayoutChoice:
    """What the graph asks for. `ranks` 0 means the host's usual number; a degree of 0 is chosen at the run.

    `devices`: the GPUs of the ranks, as in "0,1"; empty: the first ones.
    """

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
    distrifusion_degree: int = 1
    refresh: Refresh = "all"
    stage_blocks: str = ""
    compile: Compile = "off"
    devices: str = ""

    @property
    def gpus(self) -> tuple[int, ...]:
        """The GPUs that are asked for; none: the first ones. Raises `UserError` for text that is no list of them."""
        return gpus_of(self.devices)

    @property
    def chosen(self) -> dict[str, Any]:
        degrees = {f"{axis}_degree": getattr(self, f"{axis}_degree") for axis in AXES}
        return {name: degree for name, degree in degrees.items() if degree}

    def resolve(self, run: RunFacts, *, guided: bool, preferred_attention: AttentionKernel = "auto") -> Layout:
        """The layout for a run, whose number of ranks is known. Raises `UserError` when it does not fit the run.

        `preferred_attention`: what another node has chosen, for where `attention` is "auto".
        """
        assert run.ranks is not None
        candidates = self._candidates(run.ranks)
        best = largest_exact_layout(run.ranks, guided=guided)
        if best not in candidates:
            candidates = [layout for layout in candidates if guided or layout.cfg_degree == 1] or candidates
            best = max(candidates, key=lambda layout: (-layout.data_degree, layout.cfg_degree, layout.ulysses_degree))
        settings = ("attention", "num_patches", "warmup_steps", "weights", "refresh", "compile")
        layout = best.model_copy(update={name: getattr(self, name) for name in settings})
        layout = layout.model_copy(
            update={"stage_blocks": self.blocks_by_stage(), "preferred_attention": preferred_attention}
        )
        check_layout(layout, run)
        return layout

    def check(self, ranks: int) -> None:
        """Raise `UserError` when no layout of `ranks` ranks has the chosen degrees."""
        settings = {"weights": self.weights, "attention": self.attention}
        check_layout(self._candidates(ranks)[0].model_copy(update=settings), RunFacts(ranks=ranks))

    def blocks_by_stage(self) -> StageBlocks:
        """Raises `UserError` for text that is neither "even" nor a list of numbers."""
        text = self.stage_blocks.strip()
        if text == "even":
            return "even"
        try:
            return tuple(int(number) for number in text.split(",") if text)
        except ValueError as error:
            raise UserError(
                f"stage_blocks={self.stage_blocks!r} is no list of numbers.",
                "Write one number of blocks per stage, as in 10,9, or even, or leave it empty.",
            ) from error

    def _candidates(self, ranks: int) -> list[Layout]:
        if self.cfg_degree > 2 or len(self.chosen) == len(AXES):
            return [Layout().model_copy(update=self.chosen)]
        fitting = [
            layout
            for layout in layouts_of(ranks, **{name: getattr(self, name) for name in GIVEN})
            if all(getattr(layout, name) == degree for name, degree in self.chosen.items())
        ]
        if not fitting:
            named = " x ".join(f"{name}={degree}" for name, degree in self.chosen.items() if degree > 1)
            raise UserError(
                f"The layout's {named} cannot be completed to {ranks} ranks.",
                f"Choose degrees whose product divides {ranks}, or set them to 0 to have them chosen.",
            )
        return fitting
