"""The block view of a diffusion transformer, which every parallel method is written against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.site import Attention
from ..errors import UserError
from ..sampling.model_sampling import ModelSampling
from ..stages import block_parameters

CELL = 8
"""Pixels per latent cell, in both directions."""


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


@dataclass
class TokenState:
    """The tokens that one rank holds between two blocks. A block returns a new state.

    `image` `[B, Si, h]`, `text` `[B, St, h]`, `modulation` `[B, h]`; for the families that turn their queries and keys,
    `rotary` `[St + Si, D / 2, 2]` (attention.rotary); `skips`: image tokens that a later block takes in, by the number
    of the block that gave them; `prompts`: the pictures that its blocks are shown.
    """

    image: Tensor
    text: Tensor
    modulation: Tensor
    rotary: Tensor | None = None
    skips: Mapping[int, Tensor] = field(default_factory=dict)
    prompts: tuple[ShownPrompt, ...] = ()


@dataclass(frozen=True)
class Shard:
    """Which tokens of the whole a rank holds, of the text and of the image (row by row): a range, or their indices."""

    text: slice
    image: slice | Tensor


Block = Callable[[TokenState], TokenState]


class PartlyCompiled(ABC):
    """A block that does more than compute: it keeps things from one call to the next, or names them."""

    @abstractmethod
    def __call__(self, state: TokenState) -> TokenState:
        """The state behind the block."""

    @abstractmethod
    def compiled(self) -> Block:
        """The same block, what it computes made by `torch.compile`."""


GRAPHS = 128
"""How many graphs the blocks of one family may have, in all sizes of pictures, with and without LoRAs."""


def compiled(blocks: Sequence[Block]) -> list[Block]:
    """The blocks as `torch.compile` makes them: one of each kind, when it is first used with tensors of such sizes.

    Where ranks talk within a block, it is in pieces. All blocks of a family are one function to the compiler, however
    many kinds there are, and it would give up after 8 graphs.
    """
    torch._dynamo.config.cache_size_limit = GRAPHS  # newer releases of torch know it by this name, too
    return [block.compiled() if isinstance(block, PartlyCompiled) else torch.compile(block) for block in blocks]


class Family(ABC):
    """A transformer as `embed -> blocks -> head`. Knows nothing of ranks: it is given tokens and attention.

    `max_side`: the most rows or columns of image tokens that the model has positions for. `carries_text`: whether text
    tokens go through the blocks beside the image's; otherwise every rank has all of the text, and the state's is empty.
    `takes_references`: whether image tokens of reference pictures may follow the picture's.
    """

    name: str
    latent_channels: int
    patch_size: int
    hidden_size: int
    latent_scale: float
    latent_shift: float = 0.0
    max_side: int | None = None
    carries_text: bool = True
    takes_references: bool = False

    def __init__(
        self,
        transformer: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        *,
        latent_scale: float | None = None,
        latent_shift: float | None = None,
    ) -> None:
        """`dtype`: what the `transformer` computes in (its weights may be stored in another).

        `latent_scale`, `latent_shift`: of the model's own VAE, where they are not the family's.
        """
        self.transformer: Any = transformer
        self.dtype = dtype
        self.device = device
        self.blocks: Sequence[Block] = ()
        self.skips: Mapping[int, int] = {}
        """From each block that leaves a skip in the state to the later one that takes it."""
        self.prompt_sites: Sequence[int] = ()
        """The block of each attention site that can be shown a picture, in the sites' order."""
        shapes = {name: parameter.shape for name, parameter in transformer.named_parameters()}
        self.block_parameters: Sequence[int] = list(block_parameters(shapes).values())
        """How many parameters each block has, in the whole model where `transformer` is a part of one."""
        if latent_scale is not None:
            self.latent_scale = latent_scale
        if latent_shift is not None:
            self.latent_shift = latent_shift

    @abstractmethod
    def use_attention(self, attention: Attention) -> None:
        """Route every attention site of the model through `attention`."""

    def forget_texts(self) -> None:  # noqa: B027 most families keep nothing of a text
        """Forget what was made of the text of conditions: the layers that made it have changed."""

    @abstractmethod
    def check_condition(self, condition: Condition) -> None:
        """Raise `UserError` when the conditioning is not of this model's kind."""

    @abstractmethod
    def model_sampling(self, shift: float | None) -> ModelSampling:
        """Sigmas and prediction type; `shift` replaces the family's own flow shift."""

    @abstractmethod
    def embed(
        self, tokens: Tensor, timestep: Tensor, condition: Condition, shard: Shard, grid: tuple[int, int]
    ) -> TokenState:
        """Whole-picture latent `tokens` `[B, S, c]`, those of references after them -> the state of those in `shard`.

        `timestep` `[B]` is what `model_sampling.timestep` gives; `grid`: rows and columns of the picture's tokens.
        """

    @abstractmethod
    def resume(
        self, image: Tensor, text: Tensor, timestep: Tensor, condition: Condition, shard: Shard, grid: tuple[int, int]
    ) -> TokenState:
        """The state of the tokens in `shard`, embedded or out of a block already: `image` and `text` `[B, S, h]`."""

    @abstractmethod
    def head(self, state: TokenState) -> Tensor:
        """The prediction for the image tokens of `state`, `[B, Si, C * patch_size**2]`."""

    def add_residual(self, state: TokenState, block: int, residual: Tensor) -> TokenState:
        """The state after `block` with a control's residual of its image tokens."""
        return replace(state, image=state.image + residual)

    def text_length(self, condition: Condition) -> int:
        """How many text tokens go through the blocks."""
        return condition.tokens.shape[1] if self.carries_text else 0

    @property
    def input_channels(self) -> int:
        """Channels of what the model takes: the noisy latent's, and of what an inpainting model is shown beside it."""
        return self.latent_channels

    def refuse_shift(self, shift: float | None) -> None:
        """Raise `UserError` when the graph sets the flow shift of a model that is no flow."""
        if shift is not None:
            raise UserError(
                f"A {self.name} model has no flow shift, and the graph sets it to {shift:g}.",
                "Remove the ModelSampling node before Parallel Sampler.",
            )

    def process_in(self, latent: Tensor) -> Tensor:
        """From the VAE's latent to the latent that the transformer was trained on."""
        return (latent - self.latent_shift) * self.latent_scale

    def process_out(self, latent: Tensor) -> Tensor:
        """The inverse of `process_in`."""
        return latent / self.latent_scale + self.latent_shift

    def tokenize(self, latent: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, S, C * patch_size**2]`, row by row; H and W need not be multiples of the patch."""
        patch = self.patch_size
        height, width = latent.shape[-2:]
        if height % patch or width % patch:
            # Wrapping around is what the reference implementations do with a half patch at the border.
            latent = F.pad(latent, (0, -width % patch, 0, -height % patch), mode="circular")
        return F.pixel_unshuffle(latent, patch).flatten(2).transpose(1, 2)

    def tokenize_all(self, latent: Tensor, condition: Condition) -> Tensor:
        """The tokens of `latent` `[B, C, H, W]`, then those of the condition's references, one after the other."""
        pictures = [latent, *(each.to(latent).expand(len(latent), -1, -1, -1) for each in condition.references)]
        return torch.cat([self.tokenize(picture) for picture in pictures], dim=1)

    def untokenize(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `tokenize`: `[B, S, C * patch_size**2]` -> `[B, C, height, width]`."""
        rows, columns = -(-height // self.patch_size), -(-width // self.patch_size)
        latent = F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), self.patch_size)
        return latent[..., :height, :width]


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
