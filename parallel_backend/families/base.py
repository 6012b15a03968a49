"""The block view of a diffusion transformer, which every parallel method is written against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.site import Attention
from ..errors import UserError
from ..sampling.model_sampling import ModelSampling


@dataclass(frozen=True)
class Condition:
    """What guides one prediction: `tokens` `[B, St, C]`, `pooled` `[B, Cp]`, the distilled `guidance` scale."""

    tokens: Tensor
    pooled: Tensor
    guidance: float | None = None

    def part(self, part: slice, batch: int) -> Condition:
        """The condition of the pictures `part` of a batch; one text for all of them stays one."""

        def of(tensor: Tensor) -> Tensor:
            return tensor[part] if tensor.shape[0] == batch else tensor[:1]

        return replace(self, tokens=of(self.tokens), pooled=of(self.pooled))


@dataclass
class TokenState:
    """The tokens that one rank holds between two blocks. A block returns a new state.

    `image` `[B, Si, h]`, `text` `[B, St, h]`, `modulation` `[B, h]`; for the families that turn their queries and keys,
    `rotary` `[St + Si, D / 2]` (attention.rotary).
    """

    image: Tensor
    text: Tensor
    modulation: Tensor
    rotary: Tensor | None = None


@dataclass(frozen=True)
class Shard:
    """Which tokens of the whole a rank holds, of the text and of the image (row by row): a range, or their indices."""

    text: slice
    image: slice | Tensor


Block = Callable[[TokenState], TokenState]


class Family(ABC):
    """A transformer as `embed -> blocks -> head`. Knows nothing of ranks: it is given tokens and attention.

    `max_side`: the most rows or columns of image tokens that the model has positions for.
    """

    name: str
    latent_channels: int
    patch_size: int
    hidden_size: int
    latent_scale: float
    latent_shift: float = 0.0
    max_side: int | None = None

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
        if latent_scale is not None:
            self.latent_scale = latent_scale
        if latent_shift is not None:
            self.latent_shift = latent_shift

    @abstractmethod
    def use_attention(self, attention: Attention) -> None:
        """Route every attention site of the model through `attention`."""

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
        """Whole-picture latent `tokens` `[B, S, c]` -> the state of those in `shard`.

        `timestep` `[B]` is what `model_sampling.timestep` gives; `grid`: rows and columns of image tokens.
        """

    @abstractmethod
    def resume(
        self, image: Tensor, text: Tensor, timestep: Tensor, condition: Condition, shard: Shard, grid: tuple[int, int]
    ) -> TokenState:
        """The state of the tokens in `shard`, embedded or out of a block already: `image` and `text` `[B, S, h]`."""

    @abstractmethod
    def head(self, state: TokenState) -> Tensor:
        """The prediction for the image tokens of `state`, `[B, Si, C * patch_size**2]`."""

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

    def untokenize(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `tokenize`: `[B, S, C * patch_size**2]` -> `[B, C, height, width]`."""
        rows, columns = -(-height // self.patch_size), -(-width // self.patch_size)
        latent = F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), self.patch_size)
        return latent[..., :height, :width]


def check_widths(condition: Condition, tokens: int, pooled: int, model: str, encoders: str) -> None:
    """Raise `UserError` unless the conditioning has the widths that a `model` of text `encoders` takes."""
    found = (condition.tokens.shape[-1], condition.pooled.shape[-1])
    if found != (tokens, pooled):
        raise UserError(
            f"The conditioning has text tokens of width {found[0]} and a pooled vector of {found[1]}; "
            f"this {model} model takes {tokens} and {pooled}.",
            f"Encode the prompt with the text encoders that belong to the model ({encoders}).",
        )
