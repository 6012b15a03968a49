"""What a model is conditioned on: named tensors, controls, picture prompts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..attention.site import Attention, SiteId
from ..errors import UserError
from ..tokens.grid import Grid
from ..tokens.plan import Segment
from .spec import FamilySpec

if TYPE_CHECKING:
    from .family import TokenFamily
    from .state import Evaluation


class ResidualSource(Protocol):
    """A source of residuals that are added to a model's grid tokens behind some of its blocks, such as a ControlNet."""

    def part(self, part: slice, batch: int) -> ResidualSource:
        """For the pictures `part` of a batch."""
        ...

    @property
    def kind(self) -> Hashable:
        """What those have in common that can be joined."""
        ...

    def join(self, others: Sequence[ResidualSource], batch: int) -> ResidualSource:
        """One source for batches of `batch` pictures each, of this and the `others`, which are of the same `kind`."""
        ...

    def is_active(self, timestep: float) -> bool: ...

    def targets(self, family: TokenFamily) -> dict[int, int]:
        """Maps each block of the model that gets a residual to the number of that residual."""
        ...

    def segments(
        self, family: TokenFamily, condition: Condition, grids: Mapping[str, Grid]
    ) -> dict[str, list[Segment]]:
        """The segments of its own streams; the model's grid is one of them, as its model has it."""
        ...

    def residuals(self, evaluation: Evaluation, attention: Attention) -> list[Tensor]:
        """Residuals of the grid's tokens in the `evaluation`'s shard, which is of its own streams: `[B, S, h]` each.

        `attention` spans the ranks of the shards.
        """
        ...


class TimedImagePrompt(Protocol):
    """A picture prompt at one moment of a run, as the model's attention sites see it."""

    def added(self, site: SiteId, number: int, own: Sequence[Tensor], attention: Attention) -> Tensor:
        """Returns what the prompt adds to the attention output of this rank's image tokens, `[B, Si, H * D]`.

        `number`: of the site, among those that can be given a picture. `own`: the projections of these tokens that the
        family's sites hand over, `[B, Si, H, D]` each.
        """
        ...


class ImagePrompt(Protocol):
    """A picture as a prompt, which the model sees through an IP-Adapter."""

    def part(self, part: slice, batch: int) -> ImagePrompt:
        """For the pictures `part` of a batch."""
        ...

    def is_active(self, timestep: float) -> bool: ...

    def at(self, timestep: Tensor, place: int) -> TimedImagePrompt:
        """At the times `timestep` `[B]`, as the condition's picture number `place`. It adds zero while not active."""
        ...


@dataclass(frozen=True, eq=False)
class Condition:
    """The condition of one prediction; a family knows which fields its models need. Compared by identity.

    `tensors`: by the names of the family's inputs, such as `tokens` `[B, St, C]` with a `mask` `[B, St]` of those that
    count. `guidance`: the distilled guidance scale (None: the model is given none). `size`, `target_size`: height and
    width of the picture, in pixels, for models that take them (every request gives a size); `crop`: what was cut off
    above and on the left of it; `aesthetic_score`: how beautiful it is to be. `references`: latents
    `[B, C, ..., h, w]` that the model looks at, scaled as its own; `reference_places`: the rule of their positions, by
    default the model's own. `controls` add to the model's tokens; `image_prompts` are pictures that it attends to.
    `name`: of the prompt in its run, by which step caches tell evaluations; `joins`: of how many prompts it is one.
    """

    tensors: Mapping[str, Tensor]
    guidance: float | None = None
    size: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    aesthetic_score: float | None = None
    references: tuple[Tensor, ...] = ()
    reference_places: str | None = None
    controls: tuple[ResidualSource, ...] = ()
    image_prompts: tuple[ImagePrompt, ...] = ()
    name: str = ""
    joins: int = 1

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def part(self, part: slice, batch: int) -> Condition:
        """The condition of the pictures `part` of a batch; one text for all of them stays one.

        For all pictures it is the same object, by which families keep what they have made of it.
        """
        if part.indices(batch) == (0, batch, 1):
            return self

        def of(tensor: Tensor) -> Tensor:
            return tensor[part] if tensor.shape[0] == batch else tensor[:1]

        return replace(
            self,
            tensors={name: of(tensor) for name, tensor in self.tensors.items()},
            references=tuple(map(of, self.references)),
            controls=tuple(control.part(part, batch) for control in self.controls),
            image_prompts=tuple(prompt.part(part, batch) for prompt in self.image_prompts),
        )

    @property
    def kind(self) -> Hashable:
        """What those have in common that can be joined: all but the numbers in their tensors."""
        if self.image_prompts:
            return id(self)
        return (
            tuple((name, tensor.shape[1:]) for name, tensor in sorted(self.tensors.items())),
            (self.guidance, self.size, self.target_size, self.crop, self.aesthetic_score, self.reference_places),
            tuple(reference.shape[1:] for reference in self.references),
            tuple(control.kind for control in self.controls),
        )

    def join(self, others: Sequence[Condition], batch: int) -> Condition:
        """The condition of a batch of `batch` pictures of this and of as many of each of the `others`.

        They are of one `kind`.
        """
        every = (self, *others)
        controls = zip(*(each.controls for each in every), strict=True)
        return replace(
            self,
            tensors={name: rows_of([each[name] for each in every], batch) for name in self.tensors},
            references=tuple(rows_of(same, batch) for same in zip(*(e.references for e in every), strict=True)),
            controls=tuple(first.join(rest, batch) for first, *rest in controls),
            name=" and ".join(each.name for each in every),
            joins=sum(each.joins for each in every),
        )

    def prompts_at(self, timestep: Tensor, attention: Attention) -> tuple[TimedImagePrompt, ...]:
        """The picture prompts to give the blocks at `timestep` `[B]`: the active ones.

        All of them where `attention` keeps keys and values: each has to have them at every site.
        """
        if not self.image_prompts:
            return ()
        now = float(timestep.flatten()[0])
        active = [attention.keeps or each.is_active(now) for each in self.image_prompts]
        return tuple(each.at(timestep, place) for place, each in enumerate(self.image_prompts) if active[place])


def rows_of(tensors: Sequence[Tensor], batch: int) -> Tensor:
    """The rows `[n * batch, ...]` of tensors `[1 or batch, ...]`, one after the other."""
    return torch.cat([tensor.expand(batch, *tensor.shape[1:]) for tensor in tensors])


def check_widths(condition: Condition, widths: Mapping[str, int], spec: FamilySpec) -> None:
    """Raise `UserError` unless the conditioning has tensors of the `widths` that a model of the family takes."""
    words = {each.name: each.what for each in spec.inputs}
    advice = f"Encode the prompt with the text encoders that belong to the model ({spec.encoders})."
    for name, width in widths.items():
        tensor, what = condition.get(name), words[name]
        if tensor is None:
            raise UserError(f"The conditioning has no {what}, which this {spec.title} model needs.", advice)
        if tensor.shape[-1] != width:
            raise UserError(
                f"The conditioning has {what} of width {tensor.shape[-1]}; this {spec.title} model takes {width}.",
                advice,
            )
