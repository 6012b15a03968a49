"""How the ranks share one run: the degrees of every parallel axis. Pure data, imported by nodes, launcher and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .errors import UserError

AXES = ("tensor", "ulysses", "ring", "distrifusion", "pipefusion", "cfg", "data")
"""Mesh axes from innermost (neighbouring ranks, fastest links) to outermost."""

REPLICAS = ("ulysses", "ring", "distrifusion", "cfg", "data")
"""Axes over which all ranks compute with the same weights."""

AttentionKernel = Literal["auto", "sdpa", "flash2", "flash3", "sage", "yunchang"]
Weights = Literal["whole", "sharded", "offloaded"]
Refresh = Literal["all", "in_turn"]


class Layout(BaseModel):
    """Degrees of the mesh axes and the attention kernel. The product of the degrees is the number of ranks.

    With PipeFusion (`pipefusion_degree` stages), `num_patches` strips of the picture are under way at once (0 chooses),
    after `warmup_steps` exact steps. `stage_blocks`: how many blocks each stage has; by default as evenly as possible.

    With DistriFusion, ranks use each other's keys and values of the step before, after `warmup_steps` exact steps (the
    first one always is). `refresh`: every rank sends its own each step ("all"), or one rank a step ("in_turn").

    `weights`: what the ranks that compute with the same blocks keep of them between two uses: "whole" blocks, equal
    shares of each ("sharded"), or such shares in host memory ("offloaded").
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tensor_degree: int = Field(default=1, ge=1)
    ulysses_degree: int = Field(default=1, ge=1)
    ring_degree: int = Field(default=1, ge=1)
    distrifusion_degree: int = Field(default=1, ge=1)
    pipefusion_degree: int = Field(default=1, ge=1)
    cfg_degree: int = Field(default=1, ge=1, le=2)
    data_degree: int = Field(default=1, ge=1)
    attention: AttentionKernel = "auto"
    num_patches: int = Field(default=0, ge=0)
    warmup_steps: int = Field(default=1, ge=0)
    stage_blocks: tuple[int, ...] = ()
    refresh: Refresh = "all"
    weights: Weights = "whole"

    def degree(self, axis: str) -> int:
        return getattr(self, f"{axis}_degree")

    @property
    def ranks(self) -> int:
        return prod(self.degree(axis) for axis in AXES)

    @property
    def degrees(self) -> Layout:
        """The same degrees with every other setting at its default: layouts of equal degrees share one mesh."""
        return Layout.model_validate({f"{axis}_degree": self.degree(axis) for axis in AXES})

    @property
    def sequence_degree(self) -> int:
        return self.ulysses_degree * self.ring_degree * self.distrifusion_degree

    @property
    def is_exact(self) -> bool:
        """Whether nothing is ever computed with what is one step old."""
        return self.pipefusion_degree == self.distrifusion_degree == 1

    @property
    def replicas(self) -> int:
        """How many ranks compute with the same weights."""
        return prod(self.degree(axis) for axis in REPLICAS)

    def __str__(self) -> str:
        named = [f"{axis}{self.degree(axis)}" for axis in AXES if self.degree(axis) > 1]
        weights = "" if self.weights == "whole" else f", weights {self.weights}"
        return (" x ".join(named) or "one rank") + weights


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


def check_weights(layout: Layout) -> None:
    """Raise `UserError` when the weights are to be shared, but no two ranks compute with the same."""
    if layout.weights != "sharded" or layout.replicas > 1:
        return
    parts = layout.tensor_degree * layout.pipefusion_degree
    raise UserError(
        f"weights=sharded shares each block among the ranks that compute with it, but in a layout of {layout.ranks} "
        f"ranks with tensor_degree={layout.tensor_degree} and pipefusion_degree={layout.pipefusion_degree} "
        f"every rank has blocks of its own.",
        f"Choose weights=whole, weights=offloaded, or {2 * parts} ranks with ulysses_degree=2.",
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


def check_stale(layout: Layout) -> None:
    """Raise `UserError` for two ways at once, or a kernel of its own, of using what is one step old."""
    approximate = {name: layout.degree(name) for name in ("pipefusion", "distrifusion") if layout.degree(name) > 1}
    if len(approximate) == 2:
        raise UserError(
            f"pipefusion_degree={layout.pipefusion_degree} and distrifusion_degree={layout.distrifusion_degree}: both "
            "keep keys and values of the step before, each in its own way.",
            "Set one of them to 1.",
        )
    if approximate and layout.attention == "yunchang":
        name, degree = approximate.popitem()
        raise UserError(
            f"attention=yunchang keeps no keys and values between steps, as {name}_degree={degree} needs.",
            "Choose attention=auto or another kernel.",
        )


def patches_of(layout: Layout, token_rows: int) -> int:
    """Into how many strips PipeFusion cuts a picture of `token_rows`.

    By default two per stage, as far as there are rows: fewer than one per stage leave stages idle, and one per stage
    leaves no time to hide the sends in.
    """
    return layout.num_patches or min(2 * layout.pipefusion_degree, token_rows)


def check_pipefusion(layout: Layout, *, blocks: int, token_rows: int, sampler: str, elementwise: Sequence[str]) -> None:
    """Raise `UserError` for a model, a picture or a sampler that PipeFusion cannot cut.

    `blocks`: of the model; `token_rows`: rows of image tokens; `elementwise`: the samplers that can step a strip alone.
    """
    stages, patches = layout.pipefusion_degree, layout.num_patches
    if stages == 1:
        return
    if stages > blocks:
        raise UserError(
            f"pipefusion_degree={stages} cuts the model into as many stages, but it has {blocks} blocks.",
            f"Use a pipefusion_degree of at most {blocks}.",
        )
    chosen = layout.stage_blocks
    if chosen and (len(chosen) != stages or sum(chosen) != blocks or min(chosen) < 1):
        raise UserError(
            f"stage_blocks={','.join(map(str, chosen))} gives {len(chosen)} stages {sum(chosen)} blocks in all; "
            f"pipefusion_degree={stages} makes {stages} stages, and the model has {blocks} blocks.",
            f"Name {stages} numbers from 1 on that add up to {blocks}, or none for equal shares.",
        )
    if patches > token_rows:
        raise UserError(
            f"num_patches={patches} cuts the picture into as many strips, but it has {token_rows} rows of tokens.",
            f"Use at most {token_rows} patches, or 0 to have their number chosen.",
        )
    if sampler not in elementwise:
        raise UserError(
            f"The sampler {sampler} looks at the whole latent; with pipefusion_degree={stages} it would see strips.",
            f"Use one of {', '.join(elementwise)}, or pipefusion_degree=1.",
        )


def layouts_of(ranks: int, **degrees: int) -> list[Layout]:
    """Every layout of `ranks` ranks, those with the most Ulysses parallelism first.

    `degrees`: those of the axes that are not for it to choose (tensor, DistriFusion, PipeFusion), by default 1.
    """
    replicas, left_over = divmod(ranks, prod(degrees.values()))
    given = Layout.model_validate(degrees)
    found = [
        given.model_copy(
            update={
                "ulysses_degree": ulysses,
                "ring_degree": ring,
                "cfg_degree": cfg,
                "data_degree": replicas // (ulysses * ring * cfg),
            }
        )
        for ulysses in range(replicas, 0, -1)
        for ring in range(1, replicas + 1)
        for cfg in (1, 2)
        if left_over == 0 and replicas % (ulysses * ring * cfg) == 0
    ]
    return sorted(found, key=lambda layout: (layout.data_degree, layout.ring_degree, layout.cfg_degree))


def largest_exact_layout(ranks: int, *, batch: int, guided: bool) -> Layout:
    """What "auto" means: CFG parallel first (one latent per step is all it sends), then Ulysses over the rest."""
    cfg_degree = 2 if guided and ranks % 2 == 0 else 1
    return Layout(ulysses_degree=ranks // cfg_degree, cfg_degree=cfg_degree)
