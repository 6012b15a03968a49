"""Wan 2.1, text to video: rotary self attention over all frames, cross attention to 512 tokens of umt5, one modulation.

Wan 2.2's two 14B models are of the same shapes. Source: Wan (arXiv 2503.20314). ComfyUI and diffusers compute the same,
but for fp32 rounding of the time's sines: diffusers' are the reference here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from ..sampling.model_sampling import DiscreteFlow, ModelSampling
from ..tokens.grid import Grid
from ..tokens.plan import Places
from ..tokens.rotary import Rotary, rotations_at
from .blocks import Block
from .condition import Condition, check_widths
from .cross_attention import CrossAttentionBlock, CrossAttentionFamily, CrossAttentionState, TextOfBlock
from .keys.wan import WAN
from .state import Evaluation, State

SHIFT = 8.0


@dataclass
class WanState(CrossAttentionState):
    """`block_modulation` `[B, 6, h]`: what all blocks make of `modulation` `[B, h]`, which is the head's."""

    block_modulation: Tensor | None = None


class Wan(CrossAttentionFamily):
    """All tokens of the text are attended to, the zeros behind a prompt among them."""

    spec = WAN
    streams = ("video",)
    controlled = "video"
    across_heads = True

    def adopt_network(self) -> None:
        super().adopt_network()
        config = self.transformer.config
        self.head_dim: int = config["attention_head_dim"]
        self.hidden_size = config["num_attention_heads"] * self.head_dim
        self.blocks = [_as_block(layer, text) for layer, text in zip(self.layers, self.texts, strict=True)]
        self._rotary = lru_cache(maxsize=8)(self._compute_rotary)

    @property
    def layers(self) -> Sequence[Any]:
        return self.transformer.blocks

    def check_condition(self, condition: Condition) -> None:
        check_widths(condition, {"tokens": self.transformer.config["text_dim"]}, self.spec)

    def model_sampling(self, shift: float | None) -> ModelSampling:
        return DiscreteFlow(shift=SHIFT if shift is None else shift)

    def embed(self, evaluation: Evaluation) -> WanState:
        own = evaluation.tokens["video"][:, evaluation.shard["video"]]
        return self.resume(evaluation, {"video": self.embed_patches(self.transformer.patch_embedding, own)})

    def resume(self, evaluation: Evaluation, streams: dict[str, Tensor]) -> WanState:
        made = self.transformer.condition_embedder
        modulation = made.time_embedder(made.timesteps_proj(evaluation.timestep).to(self.dtype))
        of_blocks = made.time_proj(made.act_fn(modulation)).unflatten(1, (6, -1))
        rotary = Rotary(self._rotary(evaluation.grids["video"])[evaluation.shard["video"]])
        context = self.prelude(evaluation.condition)
        return WanState(streams, modulation, rotary, context=context, block_modulation=of_blocks)

    def make_prelude(self, condition: Condition) -> Tensor:
        return self.transformer.condition_embedder.text_embedder(condition["tokens"].to(self.dtype))

    def modulated_input(self, state: State) -> Tensor:
        # The authors of TeaCache compare Wan's time alone.
        return state.modulation

    def head(self, state: State, predicted: Mapping[str, Places]) -> dict[str, Tensor]:
        model, video = self.transformer, state["video"][:, predicted["video"]]
        shift, scale = (model.scale_shift_table + state.modulation[:, None]).chunk(2, dim=1)
        normed = (model.norm_out(video.float()) * (1 + scale) + shift).to(self.dtype)
        return {"video": self.latent_tokens(model.proj_out(normed))}

    def _compute_rotary(self, grid: Grid) -> Tensor:
        """Rotations `[S, 1, D / 2, 2]`: of a head's channels a third each, about, is for frames, rows and columns."""
        side = 2 * (self.head_dim // 6)
        return rotations_at(grid.positions(self.device), (self.head_dim - 2 * side, side, side))


def _as_block(layer: Any, text: TextOfBlock) -> Block:
    def compute(state: CrossAttentionState, keys_values: tuple[Tensor, Tensor], skip: Tensor | None) -> Tensor:
        assert isinstance(state, WanState)
        return layer(state["video"], keys_values, state.block_modulation, state.rotary)

    return CrossAttentionBlock(compute, text, stream="video")
