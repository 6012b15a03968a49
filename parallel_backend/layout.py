"""How the ranks share one run: the degrees of every parallel axis. Pure data, imported by nodes, launcher and ranks."""

from __future__ import annotations

from math import prod
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .errors import UserError

AXES = ("ulysses", "ring", "cfg", "data")
"""Mesh axes from innermost (neighbouring ranks, fastest links) to outermost."""

AttentionKernel = Literal["auto", "sdpa", "flash2", "flash3", "sage", "yunchang"]


class Layout(BaseModel):
    """Degrees of the mesh axes and the attention kernel. The product of the degrees is the number of ranks."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    ulysses_degree: int = Field(default=1, ge=1)
    ring_degree: int = Field(default=1, ge=1)
    cfg_degree: int = Field(default=1, ge=1, le=2)
    data_degree: int = Field(default=1, ge=1)
    attention: AttentionKernel = "auto"

    def degree(self, axis: str) -> int:
        return getattr(self, f"{axis}_degree")

    @property
    def ranks(self) -> int:
        return prod(self.degree(axis) for axis in AXES)

    @property
    def sequence_degree(self) -> int:
        return self.ulysses_degree * self.ring_degree

    def __str__(self) -> str:
        named = [f"{axis}{self.degree(axis)}" for axis in AXES if self.degree(axis) > 1]
        return " x ".join(named) or "one rank"


def check_ranks(layout: Layout, ranks: int) -> None:
    """Raise `UserError` when the product of the degrees is not the number of ranks."""
    if layout.ranks == ranks:
        return
    degrees = " x ".join(f"{axis}_degree={layout.degree(axis)}" for axis in AXES)
    nearest = ", ".join(str(near) for near in layouts_of(ranks)[:3])
    raise UserError(
        f"The layout's degrees {degrees} multiply to {layout.ranks}, but there are {ranks} ranks.",
        f"Make the product {ranks} (for example: {nearest}) or start {layout.ranks} ranks.",
    )


def check_run(layout: Layout, *, batch: int, cfg: float, has_negative: bool) -> None:
    """Raise `UserError` when a run would leave whole ranks without work.

    `batch` is the number of pictures, `cfg` the guidance scale; at 1 the negative prompt is not evaluated.
    """
    if layout.data_degree > batch:
        raise UserError(
            f"data_degree={layout.data_degree} cuts the batch over as many replicas, but the latent holds {batch}.",
            f"Use a batch of at least {layout.data_degree}, or ulysses_degree instead of data_degree.",
        )
    guided = has_negative and cfg != 1.0
    if layout.cfg_degree == 2 and not guided:
        reason = f"cfg={cfg}" if has_negative else "no negative conditioning"
        raise UserError(
            f"cfg_degree=2 evaluates the positive and the negative prompt on different ranks, but with {reason} "
            "half of the ranks would have nothing to do.",
            "Set cfg above 1 with a negative prompt, or cfg_degree=1 and twice the ulysses_degree.",
        )


def layouts_of(ranks: int) -> list[Layout]:
    """Every layout of `ranks` ranks, those with the most Ulysses parallelism first."""
    found = [
        Layout(ulysses_degree=ulysses, ring_degree=ring, cfg_degree=cfg, data_degree=ranks // (ulysses * ring * cfg))
        for ulysses in range(ranks, 0, -1)
        for ring in range(1, ranks + 1)
        for cfg in (1, 2)
        if ranks % (ulysses * ring * cfg) == 0
    ]
    return sorted(found, key=lambda layout: (layout.data_degree, layout.ring_degree, layout.cfg_degree))


def largest_exact_layout(ranks: int, *, batch: int, guided: bool) -> Layout:
    """What "auto" means: CFG parallel first (one latent per step is all it sends), then Ulysses over the rest."""
    cfg_degree = 2 if guided and ranks % 2 == 0 else 1
    return Layout(ulysses_degree=ranks // cfg_degree, cfg_degree=cfg_degree)
