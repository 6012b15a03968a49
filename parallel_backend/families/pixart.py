"""PixArt-alpha and PixArt-Sigma: self attention, cross attention to T5, one modulation for all blocks.

Sources: PixArt-alpha (arXiv 2310.00426), PixArt-Sigma (arXiv 2403.04692).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor

from ..sampling.model_sampling import EpsPrediction, ModelSampling
from ..tokens.grid import Grid
from ..tokens.plan import Places
from .blocks import Block
from .condition import Condition, check_widths
from .cross_attention import CrossAttentionBlock, CrossAttentionFamily, CrossAttentionState, TextOfBlock
from .keys.pixart import PIXART_ALPHA, PIXART_SIGMA
from .state import Evaluation, State

MASKED = -10000.0
"""Added to the attention scores of masked tokens."""


@dataclass
class PixArtState(CrossAttentionState):
    """`block_modulation` `[B, 6 * h]`: what all blocks make of `modulation`, which is the head's."""

    block_modulation: Tensor | None = None


class PixArt(CrossAttentionFamily):
    def adopt_network(self) -> None:
        super().adopt_network()
        self.hidden_size = self.transformer.inner_dim
        self.blocks = [_as_block(layer, text) for layer, text in zip(self.layers, self.texts, strict=True)]
        self._positions = lru_cache(maxsize=8)(self._compute_positions)
        self._sizes = lru_cache(maxsize=32)(self._compute_sizes)

    @property
    def layers(self) -> Sequence[Any]:
        return self.transformer.transformer_blocks

    def check_condition(self, condition: Condition) -> None:
        check_widths(condition, {"tokens": self.transformer.config["caption_channels"]}, self.spec)

    def model_sampling(self, shift: float | None) -> ModelSampling:
        self.refuse_shift(shift)
        return EpsPrediction("sqrt_linear", linear_start=0.0001, linear_end=0.02)

    def embed(self, evaluation: Evaluation) -> PixArtState:
        own = evaluation.shard["image"]
        patches = self.embed_patches(self.transformer.pos_embed.proj, evaluation.tokens["image"][:, own])
        image = (patches + self._positions(evaluation.grids["image"])[own]).to(self.dtype)
        return self.resume(evaluation, {"image": image})

    def resume(self, evaluation: Evaluation, streams: dict[str, Tensor]) -> PixArtState:
        model, condition, timestep, batch = (
            self.transformer,
            evaluation.condition,
            evaluation.timestep,
            evaluation.batch,
        )
        picture = {"resolution": None, "aspect_ratio": None}
        if model.use_additional_conditions:
            assert condition.size is not None
            sizes = self._sizes(*condition.size).expand(batch, -1)
            picture = {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}
        block_modulation, modulation = model.adaln_single(timestep, picture, batch_size=batch, hidden_dtype=self.dtype)
        bias, mask = None, condition.get("mask")
        if mask is not None:
            bias = ((1 - mask.to(self.dtype)) * MASKED)[:, None, None].expand(batch, -1, -1, -1)
        return PixArtState(
            streams, modulation, context=self.prelude(condition), bias=bias, block_modulation=block_modulation
        )

    def make_prelude(self, condition: Condition) -> Tensor:
        return self.transformer.caption_projection(condition["tokens"].to(self.dtype))

    def modulated_input(self, state: State) -> Tensor:
        assert isinstance(state, PixArtState)
        layer, modulation = self.layers[0], cast(Tensor, state.block_modulation)
        table = layer.scale_shift_table[None] + modulation.unflatten(1, (6, -1))
        shift, scale = table[:, :2].chunk(2, dim=1)
        return layer.norm1(state["image"]) * (1 + scale) + shift

    def head(self, state: State, predicted: Mapping[str, Places]) -> dict[str, Tensor]:
        model, image = self.transformer, state["image"][:, predicted["image"]]
        shift, scale = (model.scale_shift_table[None] + state.modulation[:, None]).chunk(2, dim=1)
        return {"image": self.latent_tokens(model.proj_out(model.norm_out(image) * (1 + scale) + shift))}

    def _compute_sizes(self, height: int, width: int) -> Tensor:
        """`[1, 3]`: height and width, and their ratio. Copied to the device once: every copy waits for it."""
        return torch.tensor([[height, width, height / width]], dtype=torch.float32, device=self.device)

    def _compute_positions(self, grid: Grid) -> Tensor:
        """Sines and cosines of each token's row and column, `[S, h]`, spread over the side that it was trained on."""
        embedding = self.transformer.pos_embed
        return get_2d_sincos_pos_embed(
            self.hidden_size,
            (grid.rows, grid.columns),
            base_size=embedding.base_size,
            interpolation_scale=embedding.interpolation_scale,
            device=self.device,
            output_type="pt",
        ).float()


class PixArtAlpha(PixArt):
    spec = PIXART_ALPHA


class PixArtSigma(PixArt):
    spec = PIXART_SIGMA


def _as_block(layer: Any, text: TextOfBlock) -> Block:
    def compute(state: CrossAttentionState, keys_values: tuple[Tensor, Tensor], skip: Tensor | None) -> Tensor:
        assert isinstance(state, PixArtState)
        return layer(
            hidden_states=state["image"],
            encoder_hidden_states=keys_values,
            encoder_attention_mask=state.bias,
            timestep=state.block_modulation,
        )

    return CrossAttentionBlock(compute, text)
