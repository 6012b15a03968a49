"""The block view of a diffusion transformer, which every parallel method is written against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention.site import Attention
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

    `image` `[B, Si, h]`, `text` `[B, St, h]`, `modulation` `[B, h]`, `rotary` `[St + Si, D / 2]` (attention.rotary).
    """

    image: Tensor
    text: Tensor
    modulation: Tensor
    rotary: Tensor


@dataclass(frozen=True)
class Shard:
    """Which tokens of the whole a rank holds, of the text and of the image (row by row): a range, or their indices."""

    text: slice
    image: slice | Tensor


Block = Callable[[TokenState], TokenState]


class Family(ABC):
    """A transformer as `embed -> blocks -> head`. Knows nothing of ranks: it is given tokens and attention."""

    name: str
    latent_channels: int
    patch_size: int
    hidden_size: int

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype`: what the transformer computes in (its weights may be stored in another)."""
        self.dtype = dtype
        self.device = device
        self.blocks: Sequence[Block] = ()

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
    def process_in(self, latent: Tensor) -> Tensor:
        """From the VAE's latent to the latent that the transformer was trained on."""

    @abstractmethod
    def process_out(self, latent: Tensor) -> Tensor:
        """The inverse of `process_in`."""

    @abstractmethod
    def tokenize(self, latent: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, S, C * patch_size**2]`, row by row; H and W need not be multiples of the patch."""

    @abstractmethod
    def untokenize(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `tokenize`: `[B, S, C * patch_size**2]` -> `[B, C, height, width]`."""

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
