"""How the ranks share one run: the degrees of every parallel axis. Pure data, imported by nodes, launcher and ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UserError

AXES = ("tensor", "ulysses", "ring", "distrifusion", "pipefusion", "cfg", "data")
"""Mesh axes from innermost (neighbouring ranks, fastest links) to outermost."""

REPLICAS = ("ulysses", "ring", "distrifusion", "cfg", "data")
"""Axes over which all ranks compute with the same weights."""

AttentionKernel = Literal["auto", "sdpa", "cudnn", "flash2", "flash3", "sage", "yunchang"]
Weights = Literal["whole", "sharded", "offloaded"]
Refresh = Literal["all", "in_turn"]
Compile = Literal["off", "blocks"]
MAX_DEGREE = 1024
Degree = Annotated[int, Field(ge=1, le=MAX_DEGREE)]
Number = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
StageBlocks = Annotated[tuple[Number, ...], Field(max_length=MAX_DEGREE)] | Literal["even"]


class Layout(BaseModel):
    """Degrees of the mesh axes and the attention kernel. The product of the degrees is the number of ranks.

    With PipeFusion (`pipefusion_degree` stages), `num_patches` strips of the picture are under way at once (0 chooses),
    after `warmup_steps` exact steps. `stage_blocks`: how many blocks each stage has, or as many as the others ("even");
    by default so many that the fullest stage has as few parameters as possible.

    With DistriFusion, ranks use each other's keys and values of the step before, after `warmup_steps` exact steps (the
    first one always is). `refresh`: every rank sends its own each step ("all"), or one rank a step ("in_turn").

    `weights`: what the ranks that compute with the same blocks keep of them between two uses: "whole" blocks, equal
    shares of each ("sharded"), or such shares in host memory ("offloaded").

    `preferred_attention`: the kernel that `attention` "auto" is where it works; a node other than
    Parallel Layout chose it.

    `compile`: "blocks" computes with blocks that `torch.compile` makes. The first steps of each new size take longer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tensor_degree: Degree = 1
    ulysses_degree: Degree = 1
    ring_degree: Degree = 1
    distrifusion_degree: Degree = 1
    pipefusion_degree: Degree = 1
    cfg_degree: int = Field(default=1, ge=1, le=2)
    data_degree: Degree = 1
    attention: AttentionKernel = "auto"
    preferred_attention: AttentionKernel = "auto"
    num_patches: int = Field(default=0, ge=0, lt=1 << 31)
    warmup_steps: int = Field(default=1, ge=0, lt=1 << 31)
    stage_blocks: StageBlocks = ()
    refresh: Refresh = "all"
    weights: Weights = "whole"
    compile: Compile = "off"

    def degree(self, axis: str) -> int:
        return getattr(self, f"{axis}_degree")

    @property
    def ranks(self) -> int:
        return prod(self.degree(axis) for axis in AXES)

    @property
    def degrees(self) -> Layout:
        """The same degrees with every other setting at its default: layouts of equal degrees share one mesh."""
        return Layout.model_validate({f"{axis}_degree": self.degree(axis) for axis in AXES})

    def with_degrees(self, degrees: Sequence[int]) -> Layout:
        """The same settings with other degrees, in the order of `AXES`."""
        return self.model_copy(update=dict(zip((f"{axis}_degree" for axis in AXES), degrees, strict=True)))

    @property
    def sequence_degree(self) -> int:
        return self.ulysses_degree * self.ring_degree * self.distrifusion_degree

    @property
    def is_exact(self) -> bool:
        """Whether nothing is ever computed with what is one step old."""
        return self.pipefusion_degree == self.distrifusion_degree == 1

    @property
    def has_lone_stages(self) -> bool:
        """Whether every stage of a pipeline is computed by one rank that needs no other for it."""
        return self.tensor_degree == self.sequence_degree == 1 and (self.weights == "whole" or self.replicas == 1)

    @property
    def replicas(self) -> int:
        """How many ranks compute with the same weights."""
        return prod(self.degree(axis) for axis in REPLICAS)

    def __str__(self) -> str:
        named = [f"{axis}{self.degree(axis)}" for axis in AXES if self.degree(axis) > 1]
        weights = "" if self.weights == "whole" else f", weights {self.weights}"
        sizes = self.stage_blocks if self.stage_blocks == "even" else ",".join(map(str, self.stage_blocks))
        stages = f", stage_blocks {sizes}" if sizes else ""
        compiled = "" if self.compile == "off" else f", {self.compile} compiled"
        return (" x ".join(named) or "one rank") + stages + weights + compiled


def parse_layout(text: str) -> Layout:
    """`ulysses_degree=2,cfg_degree=2`, as a command line gives it, as a layout. Raises `UserError` for what is none.

    A value may be a list: `pipefusion_degree=2,stage_blocks=29,28`.
    """
    fields: dict[str, int | str | tuple[int, ...]] = {}
    for pair in re.split(r",(?!\s*\d+\s*(?:,|$))", text):
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{pair!r} in --layout {text} is not of the form NAME=VALUE.")
        numbers = value.split(",")
        if not all(number.strip().isdecimal() for number in numbers):
            fields[name.strip()] = value.strip()
        elif len(numbers) == 1:
            fields[name.strip()] = int(value)
        else:
            fields[name.strip()] = tuple(map(int, numbers))
    try:
        return Layout.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(Layout.model_fields)
        raise UserError(
            f"--layout {text}: {first['loc'][0]}: {first['msg']}.", f"A layout is made of {known}."
        ) from error


def patches_of(layout: Layout, token_rows: int) -> int:
    """Into how many strips PipeFusion cuts a picture of `token_rows`.

    By default two per stage, as far as there are rows: fewer than one per stage leave stages idle, and one per stage
    leaves no time to hide the sends in.
    """
    return layout.num_patches or min(2 * layout.pipefusion_degree, token_rows)


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


def largest_exact_layout(ranks: int, *, guided: bool) -> Layout:
    """What "auto" means: CFG parallel first (one latent per step is all it sends), then Ulysses over the rest."""
    cfg_degree = 2 if guided and ranks % 2 == 0 else 1
    return Layout(ulysses_degree=ranks // cfg_degree, cfg_degree=cfg_degree)
