"""Mochi 1, text to video: joint attention of a video and a text of another width, with positions that each head learns.

Source: Mochi 1 (Genmo, github.com/genmoai/mochi). The model's time goes from noise to video; it predicts the
difference of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_mochi import MochiTransformer3DModel
from torch import Tensor

from ..sampling.model_sampling import DiscreteFlow, ModelSampling
from ..tokens.grid import Grid
from ..tokens.plan import Places
from ..tokens.rotary import Rotary
from .blocks import Block
from .condition import Condition, check_widths
from .joint import JointFamily, JointSite
from .keys.mochi import MOCHI
from .state import Evaluation, State

SHIFT = 6.0


class Mochi(JointFamily):
    """The image is a video. The prelude: the text, `[B or 1, St, width]`, and what is made of it as a whole
    for the modulation, `[B or 1, h]`."""

    spec = MOCHI

    def adopt_network(self) -> None:
        self.transformer = cast(MochiTransformer3DModel, self.transformer)
        self.config = self.transformer.config
        head_dim: int = self.config["attention_head_dim"]
        self.hidden_size = self.config["num_attention_heads"] * head_dim
        layers = self.transformer.transformer_blocks
        for number, layer in enumerate(layers):
            cast(Any, layer.attn1).processor = JointSite(self.sites, number, head_dim)
        self.blocks = [_as_block(layer) for layer in layers]
        self._places = lru_cache(maxsize=8)(self._compute_places)

    @property
    def widths(self) -> dict[str, int]:
        return {"text": self.config["pooled_projection_dim"], "image": self.hidden_size}

    def check_condition(self, condition: Condition) -> None:
        check_widths(condition, {"tokens": self.config["text_embed_dim"]}, self.spec)

    def model_sampling(self, shift: float | None) -> ModelSampling:
        return DiscreteFlow(shift=SHIFT if shift is None else shift, multiplier=1.0)

    def make_prelude(self, condition: Condition) -> tuple[Tensor, Tensor]:
        embed = cast(Any, self.transformer.time_embed)
        text = condition["tokens"].to(self.dtype)
        return embed.caption_proj(text), embed.pooler(text, text.new_ones(text.shape[:2]))

    def embed(self, evaluation: Evaluation) -> State:
        text, _ = self.prelude(evaluation.condition)
        text = text[:, evaluation.shard["text"]].expand(evaluation.batch, -1, -1)
        image = self.embed_patches(cast(Any, self.transformer.patch_embed).proj, self.own_image(evaluation))
        return self.resume(evaluation, {"text": text, "image": image})

    def resume(self, evaluation: Evaluation, streams: dict[str, Tensor]) -> State:
        embed = cast(Any, self.transformer.time_embed)
        _, pooled = self.prelude(evaluation.condition)
        time = embed.time_proj((1 - evaluation.timestep) * 1000).to(self.dtype)
        places = self._places(evaluation.grids["image"])[evaluation.shard["image"]]
        return State(streams, embed.timestep_embedder(time) + pooled, self._turned(streams["text"].shape[1], places))

    def head(self, state: State, predicted: Mapping[str, Places]) -> dict[str, Tensor]:
        model = cast(Any, self.transformer)
        output = model.proj_out(model.norm_out(state["image"][:, predicted["image"]], state.modulation))
        return {"image": -self.latent_tokens(output)}

    def _compute_places(self, grid: Grid) -> Tensor:
        """`[S, 3]`: frame, row and column of the video's tokens, these two from its centre, so large that they span the
        same area in every size."""
        rope = cast(Any, self.transformer.rope)
        return rope._get_positions(grid.frames, grid.rows, grid.columns, self.device, torch.float32)

    def _turned(self, text: int, places: Tensor) -> Rotary:
        """The rotary of so many tokens of text, which are not turned, and of the video's at `places` `[S, 3]`."""
        angles = torch.einsum("sa,ahf->shf", places, self.transformer.pos_frequencies.float())
        angles = F.pad(angles, (0, 0, 0, 0, text, 0))
        return Rotary(torch.stack((angles.cos(), angles.sin()), dim=-1)).heads(self.own_heads())


def _as_block(layer: Any) -> Block:
    def block(state: State) -> State:
        image, text = layer(
            hidden_states=state["image"],
            encoder_hidden_states=state["text"],
            temb=state.modulation,
            encoder_attention_mask=None,
            image_rotary_emb=state.rotary,
        )
        return state.with_streams(text=text, image=image)

    return block
