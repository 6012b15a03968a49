"""The block view of a diffusion transformer, which every parallel method is written against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.site import Attention
from ..errors import UserError
from ..layout.stages import block_parameters
from ..sampling.model_sampling import ModelSampling
from ..tokens.plan import Shard
from .blocks import Block
from .condition import Condition
from .state import TokenState


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
