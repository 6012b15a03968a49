"""HunyuanDiT: rotary self attention, cross attention to two texts, and a skip from each early block to its mirror.

Source: Hunyuan-DiT (arXiv 2405.08748).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_from_grid
from torch import Tensor

from ..errors import UserError
from ..sampling.model_sampling import ModelSampling, VPrediction
from ..tokens.grid import Grid
from ..tokens.plan import Places
from ..tokens.rotary import Rotary, rotations
from .blocks import Block
from .condition import Condition, check_widths
from .cross_attention import CrossAttentionBlock, CrossAttentionFamily, CrossAttentionState, TextOfBlock
from .keys.hunyuandit import HUNYUANDIT, skips
from .state import Evaluation, State

TRAINED_SIDE = 64
"""Latent cells of the square that positions are spread over."""
BETA_END = {True: 0.03, False: 0.018}
"""The schedule's last beta, by whether the model takes the size of the picture (up to version 1.1)."""


class HunyuanDiT(CrossAttentionFamily):
    spec = HUNYUANDIT

    def adopt_network(self) -> None:
        super().adopt_network()
        model = self.transformer
        self.hidden_size = model.inner_dim
        count = len(model.blocks)
        self.skips = skips(count)
        sources = {target: source for source, target in self.skips.items()}
        self.blocks = [
            as_block(layer, text, number if number in self.skips else None, sources.get(number))
            for number, (layer, text) in enumerate(zip(model.blocks, self.texts, strict=True))
        ]
        self._rotary = lru_cache(maxsize=8)(self._compute_rotary)
        self._sizes = lru_cache(maxsize=32)(self._compute_sizes)

    @property
    def layers(self) -> Sequence[Any]:
        return self.transformer.blocks

    def check_condition(self, condition: Condition) -> None:
        config = self.transformer.config
        widths = {"tokens": config["cross_attention_dim"], "tokens_2": config["cross_attention_dim_t5"]}
        check_widths(condition, widths, self.spec)
        for name, length in (("", config["text_len"]), ("_2", config["text_len_t5"])):
            found = condition.get(f"mask{name}")
            if found is None or found.shape[1] < length:
                length_found = "no attention mask" if found is None else f"{found.shape[1]}"
                raise UserError(
                    f"A HunyuanDiT model needs {length} text tokens{' of mT5' if name else ''}, padded, with their "
                    f"attention mask; the conditioning has {length_found}.",
                    f"Encode the prompt with the text encoders that belong to the model ({self.spec.encoders}).",
                )

    def model_sampling(self, shift: float | None) -> ModelSampling:
        self.refuse_shift(shift)
        return VPrediction(linear_end=BETA_END[self.transformer.config["use_style_cond_and_image_meta_size"]])

    def embed(self, evaluation: Evaluation) -> CrossAttentionState:
        own = evaluation.tokens["image"][:, evaluation.shard["image"]]
        return self.resume(evaluation, {"image": self.embed_patches(self.transformer.pos_embed.proj, own)})

    def resume(self, evaluation: Evaluation, streams: dict[str, Tensor]) -> CrossAttentionState:
        model, condition, timestep, batch = (
            self.transformer,
            evaluation.condition,
            evaluation.timestep,
            evaluation.batch,
        )
        tokens_2 = condition["tokens_2"].to(self.dtype)[:, : model.config["text_len_t5"]]
        assert condition.size is not None
        modulation = model.time_extra_emb(
            timestep,
            tokens_2.expand(batch, -1, -1),
            self._sizes(condition.size, condition.target_size or condition.size).expand(batch, -1).contiguous(),
            torch.zeros(batch, dtype=torch.int64, device=timestep.device),
            hidden_dtype=self.dtype,
        )
        rotary = Rotary(self._rotary(evaluation.grids["image"])[evaluation.shard["image"]])
        return CrossAttentionState(streams, modulation, rotary, context=self.prelude(condition))

    def make_prelude(self, condition: Condition) -> Tensor:
        model = self.transformer
        padding = model.text_embedding_padding.split([model.config["text_len"], model.config["text_len_t5"]])
        first = _with_padding(condition["tokens"].to(self.dtype), condition["mask"], padding[0])
        tokens_2 = model.text_embedder(condition["tokens_2"].to(self.dtype))
        second = _with_padding(tokens_2, condition["mask_2"], padding[1])
        batch = max(first.shape[0], second.shape[0])
        return torch.cat([each.expand(batch, -1, -1) for each in (first, second)], dim=1)

    def modulated_input(self, state: State) -> Tensor:
        return self.layers[0].norm1(state["image"], state.modulation)

    def head(self, state: State, predicted: Mapping[str, Places]) -> dict[str, Tensor]:
        model, image = self.transformer, state["image"][:, predicted["image"]]
        return {"image": self.latent_tokens(model.proj_out(model.norm_out(image, state.modulation.float())))}

    def add_residual(self, state: State, block: int, residual: Tensor) -> State:
        if block not in state.skips:
            return state  # A step cache has passed over the block, and over the one that would take its skip.
        return replace(state, skips={**state.skips, block: state.skips[block] + residual})

    def _compute_sizes(self, size: tuple[int, int], target_size: tuple[int, int]) -> Tensor:
        """`[1, 6]`, with the corner of a crop that is none. Copied to the device once: every copy waits for it."""
        return torch.tensor([[*size, *target_size, 0, 0]], dtype=torch.float32, device=self.device)

    def _compute_rotary(self, grid: Grid) -> Tensor:
        """Rotations `[S, 1, D / 2, 2]`: the picture fills the longer side of the square of the training."""
        side, counts = TRAINED_SIDE // self.latent.patch[1], (grid.rows, grid.columns)
        extents = [round(side / max(counts) * count) for count in counts]
        starts = [round((side - extent) / 2) for extent in extents]
        # Whole steps from the start, as the model was trained: diffusers' own function spreads them otherwise.
        rows, columns = (
            start + torch.arange(count, device=self.device) * extent / count
            for start, extent, count in zip(starts, extents, counts, strict=True)
        )
        places = torch.stack(torch.meshgrid(columns, rows, indexing="xy")).unsqueeze(1)
        head_dim = self.transformer.config["attention_head_dim"]
        return rotations(*get_2d_rotary_pos_embed_from_grid(head_dim, places, use_real=True))


def _with_padding(text: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
    """`text` `[B, St, C]`, its last tokens replaced by those of `padding` where they do not count."""
    start = text.shape[1] - padding.shape[0]
    last = torch.where(mask[:, start:, None].bool(), text[:, start:], padding.to(text.dtype))
    return torch.cat((text[:, :start], last), dim=1)


def as_block(layer: Any, text: TextOfBlock, gives: int | None = None, takes: int | None = None) -> Block:
    """`text`, `gives`, `takes`: as in `CrossAttentionBlock`."""

    def compute(state: CrossAttentionState, keys_values: tuple[Tensor, Tensor], skip: Tensor | None) -> Tensor:
        return layer(
            hidden_states=state["image"],
            temb=state.modulation,
            encoder_hidden_states=keys_values,
            image_rotary_emb=state.rotary,
            skip=skip,
        )

    return CrossAttentionBlock(compute, text, gives, takes)
