"""HunyuanVideo, text to video: blocks of its own refine the text, then joint attention as in Flux.1, over all frames.

Sources: HunyuanVideo (arXiv 2412.03603); SkyReels-V1, of the same blocks, has no distilled guidance. Tokens of the text
that its mask leaves out are left out, as in diffusers. ComfyUI's network would count them in a mean, but its text
encoders give it none. What refines the text knows the time, so it is done in every evaluation, of the whole text.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from torch import Tensor

from ..sampling.model_sampling import DiscreteFlow, ModelSampling
from ..tokens.grid import Grid
from ..tokens.plan import Places
from ..tokens.rotary import rotations_at
from .blocks import Block
from .condition import Condition, check_widths
from .joint import JointFamily, JointSite, SingleBlock, own_rotary
from .keys.hunyuanvideo import HUNYUANVIDEO
from .state import Evaluation, State

SHIFT = 7.0


class HunyuanVideo(JointFamily):
    """The image is a video."""

    spec = HUNYUANVIDEO

    def adopt_network(self) -> None:
        self.transformer = cast(HunyuanVideoTransformer3DModel, self.transformer)
        config = self.transformer.config
        head_dim: int = config["attention_head_dim"]
        self.hidden_size = config["num_attention_heads"] * head_dim
        double, single = self.transformer.transformer_blocks, self.transformer.single_transformer_blocks
        for number, layer in enumerate(double):
            cast(Any, layer.attn).set_processor(JointSite(self.sites, number, head_dim))
        singles = [SingleBlock(layer, self.sites, number, head_dim) for number, layer in enumerate(single, len(double))]
        self.blocks = [*map(_double_block, double), *singles]
        self._rotary = lru_cache(maxsize=8)(self._compute_rotary)

    def check_condition(self, condition: Condition) -> None:
        config = self.transformer.config
        widths = {"tokens": config["text_embed_dim"], "pooled": config["pooled_projection_dim"]}
        check_widths(condition, widths, self.spec)

    def model_sampling(self, shift: float | None) -> ModelSampling:
        return DiscreteFlow(shift=SHIFT if shift is None else shift)

    def embed(self, evaluation: Evaluation) -> State:
        image = self.embed_patches(self.transformer.x_embedder.proj, self.own_image(evaluation))
        tokens = evaluation.condition["tokens"].to(self.dtype).expand(evaluation.batch, -1, -1)
        text = self.transformer.context_embedder(tokens, evaluation.timestep)[:, evaluation.shard["text"]]
        return self.resume(evaluation, {"text": text, "image": image})

    def resume(self, evaluation: Evaluation, streams: dict[str, Tensor]) -> State:
        condition = evaluation.condition
        embed = cast(Any, self.transformer.time_text_embed)
        pooled = condition["pooled"].to(self.dtype).expand(evaluation.batch, -1)
        modulation = embed.timestep_embedder(embed.time_proj(evaluation.timestep).to(self.dtype))
        if embed.guidance_embedder is not None and condition.guidance is not None:
            guidance = embed.time_proj(torch.full_like(evaluation.timestep, condition.guidance) * 1000)
            modulation = modulation + embed.guidance_embedder(guidance.to(self.dtype))
        modulation = modulation + embed.text_embedder(pooled)
        text_length = condition["tokens"].shape[1]
        rotations = self._rotary(text_length, evaluation.grids["image"])
        return State(streams, modulation, own_rotary(rotations, text_length, evaluation.shard))

    def modulated_input(self, state: State) -> Tensor:
        return cast(Any, self.transformer.transformer_blocks[0]).norm1(state["image"], emb=state.modulation)[0]

    def head(self, state: State, predicted: Mapping[str, Places]) -> dict[str, Tensor]:
        image = state["image"][:, predicted["image"]]
        return {"image": self.transformer.proj_out(self.transformer.norm_out(image, state.modulation))}

    def _compute_rotary(self, text_length: int, grid: Grid) -> Tensor:
        """Rotations `[St + S, 1, D / 2, 2]`: text tokens sit at position 0, others at their frame, row and column."""
        places = grid.positions(self.device)
        text = places.new_zeros(text_length, 3)
        config = self.transformer.config
        return rotations_at(torch.cat((text, places)), config["rope_axes_dim"], config["rope_theta"])


def _double_block(layer: Any) -> Block:
    def block(state: State) -> State:
        image, text = layer(
            hidden_states=state["image"],
            encoder_hidden_states=state["text"],
            temb=state.modulation,
            freqs_cis=state.rotary,
        )
        return state.with_streams(text=text, image=image)

    return block
