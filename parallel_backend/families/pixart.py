"""PixArt-alpha and PixArt-Sigma: self attention, cross attention to T5, one modulation for all blocks.

Sources: PixArt-alpha (arXiv 2310.00426), PixArt-Sigma (arXiv 2403.04692).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn

from ..sampling.model_sampling import EpsPrediction, ModelSampling
from ..tokens.plan import Shard
from .blocks import Block
from .condition import Condition, check_widths
from .cross_attention import CrossAttentionBlock, CrossAttentionFamily, CrossAttentionState, TextOfBlock
from .state import TokenState

MASKED = -10000.0
"""What is added to the scores of tokens that do not count."""


@dataclass
class PixArtState(CrossAttentionState):
    """`block_modulation` `[B, 6 * h]`: what all blocks make of `modulation`, which is the head's."""

    block_modulation: Tensor | None = None


class PixArt(CrossAttentionFamily):
    def __init__(
        self, transformer: nn.Module, dtype: torch.dtype, device: torch.device, **latent: float | None
    ) -> None:
        super().__init__(transformer, dtype, device, **latent)
        self.hidden_size = self.transformer.inner_dim
        self.out_channels = self.transformer.out_channels
        self.blocks = [_as_block(layer, text) for layer, text in zip(self.layers, self.texts, strict=True)]
        self._positions = lru_cache(maxsize=8)(self._compute_positions)

    @property
    def layers(self) -> Sequence[Any]:
        return self.transformer.transformer_blocks

    def check_condition(self, condition: Condition) -> None:
        check_widths(condition, {"tokens": self.transformer.config["caption_channels"]}, "PixArt", "T5-XXL")

    def model_sampling(self, shift: float | None) -> ModelSampling:
        self.refuse_shift(shift)
        return EpsPrediction("sqrt_linear", linear_start=0.0001, linear_end=0.02)

    def embed(
        self, tokens: Tensor, timestep: Tensor, condition: Condition, shard: Shard, grid: tuple[int, int]
    ) -> PixArtState:
        patches = self.embed_patches(self.transformer.pos_embed.proj, tokens[:, shard.image])
        image = (patches + self._positions(grid)[shard.image]).to(self.dtype)
        return self.resume(image, self.no_text(image), timestep, condition, shard, grid)

    def resume(
        self, image: Tensor, text: Tensor, timestep: Tensor, condition: Condition, shard: Shard, grid: tuple[int, int]
    ) -> PixArtState:
        model, batch = self.transformer, image.shape[0]
        told = {"resolution": None, "aspect_ratio": None}
        if model.use_additional_conditions:
            assert condition.size is not None
            height, width = condition.size
            told = {
                "resolution": image.new_tensor([[height, width]], dtype=torch.float32).expand(batch, -1),
                "aspect_ratio": image.new_tensor([[height / width]], dtype=torch.float32).expand(batch, -1),
            }
        block_modulation, modulation = model.adaln_single(timestep, told, batch_size=batch, hidden_dtype=self.dtype)
        bias = None
        if condition.mask is not None:
            bias = ((1 - condition.mask.to(self.dtype)) * MASKED)[:, None, None].expand(batch, -1, -1, -1)
        return PixArtState(
            image=image,
            text=text,
            modulation=modulation,
            context=self.context(condition),
            bias=bias,
            block_modulation=block_modulation,
        )

    def make_context(self, condition: Condition) -> Tensor:
        return self.transformer.caption_projection(condition.tokens.to(self.dtype))

    def head(self, state: TokenState) -> Tensor:
        model = self.transformer
        shift, scale = (model.scale_shift_table[None] + state.modulation[:, None]).chunk(2, dim=1)
        return self.latent_tokens(model.proj_out(model.norm_out(state.image) * (1 + scale) + shift))

    def _compute_positions(self, grid: tuple[int, int]) -> Tensor:
        """Sines and cosines of each token's row and column, `[S, h]`, spread over the side that it was trained on."""
        embedding = self.transformer.pos_embed
        return get_2d_sincos_pos_embed(
            self.hidden_size,
            grid,
            base_size=embedding.base_size,
            interpolation_scale=embedding.interpolation_scale,
            device=self.device,
            output_type="pt",
        ).float()


class PixArtAlpha(PixArt):
    name = "pixart-alpha"
    latent_scale = 0.18215


class PixArtSigma(PixArt):
    name = "pixart-sigma"
    latent_scale = 0.13025


def _as_block(layer: Any, text: TextOfBlock) -> Block:
    def compute(state: CrossAttentionState, keys_values: tuple[Tensor, Tensor], skip: Tensor | None) -> Tensor:
        assert isinstance(state, PixArtState)
        return layer(
            hidden_states=state.image,
            encoder_hidden_states=keys_values,
            encoder_attention_mask=state.bias,
            timestep=state.block_modulation,
        )

    return CrossAttentionBlock(compute, text)
