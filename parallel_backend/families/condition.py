"""What a model is conditioned on: named tensors, controls, picture prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ..attention.site import Attention
from ..errors import UserError
from ..tokens.plan import Shard

if TYPE_CHECKING:
    from .family import Family


class Control(Protocol):
    """What adds residuals to the model's image tokens behind some of its blocks.

    `extra_text`: how many text tokens it has of its own, before those of the prompt.
    """

    @property
    def extra_text(self) -> int: ...

    def part(self, part: slice, batch: int) -> Control:
        """For the pictures `part` of a batch."""
        ...

    def is_active(self, timestep: float) -> bool: ...

    def targets(self, family: Family) -> dict[int, int]:
        """From each block of the model that gets a residual to the number of that residual."""
        ...

    def residuals(
        self,
        tokens: Tensor,
        timestep: Tensor,
        condition: Condition,
        shard: Shard,
        grid: tuple[int, int],
        attention: Attention,
    ) -> list[Tensor]:
        """Of the image tokens in `shard`, `[B, Si, h]` each; `tokens` as for `Family.embed`.

        `shard.text` counts from its own first text token; `attention` spans the ranks of the shards.
        """
        ...


class ShownPrompt(Protocol):
    """A picture prompt at one moment of a run, as the model's attention sites see it."""

    def added(self, site: int, own: Sequence[Tensor], attention: Attention) -> Tensor:
        """What it adds at that site to what this rank's image tokens have attended to, `[B, Si, H * D]`.

        `own`: the projections of these tokens that the family's sites hand over, `[B, Si, H, D]` each.
        """
        ...


class ImagePrompt(Protocol):
    """A picture as a prompt, which the model sees through an IP-Adapter."""

    def part(self, part: slice, batch: int) -> ImagePrompt:
        """For the pictures `part` of a batch."""
        ...

    def is_active(self, timestep: float) -> bool: ...

    def at(self, timestep: Tensor) -> ShownPrompt:
        """At the times `timestep` `[B]`. While it is not active, what it adds is zero."""
        ...


@dataclass(frozen=True, eq=False)
class Condition:
    """What guides one prediction; which of it a model needs, its family knows. Equal to no other.

    `tokens` `[B, St, C]`, with a `mask` `[B, St]` of those that count (without one: all); those of a second encoder;
    `pooled` `[B, Cp]`; the distilled `guidance` scale (None: the model is told of none); what the model is told of the
    picture's `size` and `target_size` (height and width, in pixels; every request tells a size); the latents of
    `references` `[B, C, h, w]` that it looks at, scaled as its own, and by what rule they lie beside it; the `controls`
    that add to it; the pictures that it is shown.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    tokens_2: Tensor | None = None
    mask_2: Tensor | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    references: tuple[Tensor, ...] = ()
    reference_places: str = "offset"
    controls: tuple[Control, ...] = ()
    image_prompts: tuple[ImagePrompt, ...] = ()

    def part(self, part: slice, batch: int) -> Condition:
        """The condition of the pictures `part` of a batch; one text for all of them stays one.

        For all pictures it is the same object, by which families keep what they have made of its text.
        """
        if part.indices(batch) == (0, batch, 1):
            return self

        def of(tensor: Tensor) -> Tensor:
            return tensor[part] if tensor.shape[0] == batch else tensor[:1]

        tensors = {name: of(tensor) for name in CONDITION_TENSORS if (tensor := getattr(self, name)) is not None}
        return replace(
            self,
            **tensors,
            references=tuple(map(of, self.references)),
            controls=tuple(control.part(part, batch) for control in self.controls),
            image_prompts=tuple(prompt.part(part, batch) for prompt in self.image_prompts),
        )

    def prompts_at(self, timestep: Tensor, attention: Attention) -> tuple[ShownPrompt, ...]:
        """The picture prompts to show the blocks at `timestep` `[B]`: the active ones.

        All of them where `attention` keeps keys and values, so that its sites are the same ones in every evaluation.
        """
        if not self.image_prompts:
            return ()
        now = float(timestep[0])
        return tuple(each.at(timestep) for each in self.image_prompts if attention.keeps or each.is_active(now))


CONDITION_TENSORS = {"tokens": 3, "pooled": 2, "mask": 2, "tokens_2": 3, "mask_2": 2}
"""The tensors of a `Condition`, and their number of dims."""

CONDITION_WORDS = {
    "tokens": "text tokens",
    "pooled": "a pooled vector",
    "mask": "a mask of the text tokens",
    "tokens_2": "text tokens of a second encoder",
    "mask_2": "a mask of the second encoder's tokens",
}


def check_widths(condition: Condition, widths: Mapping[str, int], model: str, encoders: str) -> None:
    """Raise `UserError` unless the conditioning has tensors of the `widths` that a `model` of text `encoders` takes."""
    advice = f"Encode the prompt with the text encoders that belong to the model ({encoders})."
    for name, width in widths.items():
        tensor = getattr(condition, name)
        what = CONDITION_WORDS[name]
        if tensor is None:
            raise UserError(f"The conditioning has no {what}, which this {model} model needs.", advice)
        if tensor.shape[-1] != width:
            raise UserError(
                f"The conditioning has {what} of width {tensor.shape[-1]}; this {model} model takes {width}.", advice
            )
