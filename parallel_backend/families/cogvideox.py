"""CogVideoX 2B and 5B, and 1.5, text to video: one set of weights for text and video, which attend to each other.

Source: CogVideoX (arXiv 2408.06072). 2B adds a table of positions to the video, the others turn queries and keys.
Positions and noise levels are those of diffusers' pipelines: ComfyUI 0.33 multiplies 5B's rows and columns by 1.875,
and its KSampler gives a model noise of 4500 times the deviation that it was trained with. An odd frame of 1.5's
is paired with the first one, as in ComfyUI; diffusers' pipeline puts another in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from diffusers.models.embeddings import get_3d_sincos_pos_embed
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from torch import Tensor

from ..attention.site import KeySet
from ..sampling.model_sampling import ModelSampling, VPrediction
from ..tokens.grid import Grid
from ..tokens.plan import Places
from ..tokens.rotary import Rotary, rotations_at
from .blocks import Block
from .condition import Condition, check_widths
from .family import Sites
from .joint import STREAMS, JointFamily, own_rotary
from .keys.cogvideox import COGVIDEOX, COGVIDEOX15
from .state import Evaluation, State

SNR_SHIFT = 3.0
"""By how much 2B's schedule divides the ratio of signal to noise."""


class Site:
    """The processor of a block's attention: projections, norms and rotary here, the rest in `sites`."""

    def __init__(self, sites: Sites, block: int, head_dim: int) -> None:
        self.sites = sites
        self.block = block
        self.head_dim = head_dim

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        image, text, attention = hidden_states, encoder_hidden_states, self.sites.attention
        both = torch.cat((text, image), dim=1)

        def heads(project: Any) -> Tensor:
            return project(both).unflatten(-1, (-1, self.head_dim))

        def turned(x: Tensor) -> Tensor:
            return x if image_rotary_emb is None else image_rotary_emb.rotate(x)

        value = attention.send(heads(attn.to_v), STREAMS)
        key = attention.send(turned(attn.norm_k(heads(attn.to_k))), STREAMS)
        query = attention.send(turned(attn.norm_q(heads(attn.to_q))), STREAMS)
        attended = attention((self.block, "joint"), query, KeySet(key, value)).flatten(2).to(both.dtype)
        text, image = attn.to_out[0](attended).split((text.shape[1], image.shape[1]), dim=1)
        return image, text


class CogVideoX(JointFamily):
    """The image is a video."""

    spec = COGVIDEOX

    def adopt_network(self) -> None:
        self.transformer = cast(CogVideoXTransformer3DModel, self.transformer)
        self.config = self.transformer.config
        self.head_dim: int = self.config["attention_head_dim"]
        self.hidden_size = self.config["num_attention_heads"] * self.head_dim
        self.turns: bool = self.config["use_rotary_positional_embeddings"]
        layers = self.transformer.transformer_blocks
        for number, layer in enumerate(layers):
            cast(Any, layer.attn1).set_processor(Site(self.sites, number, self.head_dim))
        self.blocks = [_as_block(layer) for layer in layers]
        self._rotary = lru_cache(maxsize=8)(self._compute_rotary)
        self._table = lru_cache(maxsize=2)(self._compute_table)

    def check_condition(self, condition: Condition) -> None:
        check_widths(condition, {"tokens": self.config["text_embed_dim"]}, self.spec)

    def model_sampling(self, shift: float | None) -> ModelSampling:
        self.refuse_shift(shift)
        return VPrediction(zero_terminal=True, snr_shift=1.0 if self.turns else SNR_SHIFT)

    def embed(self, evaluation: Evaluation) -> State:
        patches = cast(Any, self.transformer.patch_embed)
        image = self.embed_patches(patches.proj, self.own_image(evaluation))
        if not self.turns:
            image = image + self._table(evaluation.grids["image"])[evaluation.shard["image"]]
        return self.resume(evaluation, {"text": patches.text_proj(self.own_text(evaluation)), "image": image})

    def resume(self, evaluation: Evaluation, streams: dict[str, Tensor]) -> State:
        model = cast(Any, self.transformer)
        modulation = model.time_embedding(model.time_proj(evaluation.timestep).to(self.dtype))
        if not self.turns:
            return State(streams, modulation)
        text_length = evaluation.condition["tokens"].shape[1]
        rotations = self._rotary(text_length, evaluation.grids["image"])
        return State(streams, modulation, own_rotary(rotations, text_length, evaluation.shard))

    def head(self, state: State, predicted: Mapping[str, Places]) -> dict[str, Tensor]:
        model = cast(Any, self.transformer)
        image = model.norm_final(state["image"][:, predicted["image"]])
        return {"image": model.proj_out(model.norm_out(image, temb=state.modulation))}

    def _compute_table(self, grid: Grid) -> Tensor:
        """What is added to the video's tokens, `[S, h]`."""
        scales = self.config["spatial_interpolation_scale"], self.config["temporal_interpolation_scale"]
        size, count = (grid.columns, grid.rows), grid.frames
        table = get_3d_sincos_pos_embed(self.hidden_size, size, count, *scales, device=self.device, output_type="pt")
        return table.flatten(0, 1).to(self.dtype)

    def _compute_rotary(self, text_length: int, grid: Grid) -> Tensor:
        """Rotations `[St + S, 1, D / 2, 2]`; text is not turned."""
        axes = (torch.arange(grid.frames, dtype=torch.float32, device=self.device), *self._sides(grid))
        places = torch.cartesian_prod(*axes)
        text = places.new_zeros(text_length, 3)
        side = self.head_dim // 8 * 3
        return rotations_at(torch.cat((text, places)), (self.head_dim // 4, side, side))

    def _sides(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """The positions of rows and columns: their numbers at the size of the training, at others they are stretched to
        span as much of its grid as fits in with their own ratio, in its middle."""
        rows, columns = self.config["sample_height"] // 2, self.config["sample_width"] // 2
        if grid.rows / grid.columns > rows / columns:
            height, width = rows, round(rows / grid.rows * grid.columns)
        else:
            height, width = round(columns / grid.columns * grid.rows), columns
        ends = ((round((rows - height) / 2), height, grid.rows), (round((columns - width) / 2), width, grid.columns))
        sides = (
            torch.linspace(start, (start + extent) * (count - 1) / count, count, device=self.device)
            for start, extent, count in ends
        )
        return cast(tuple[Tensor, Tensor], tuple(sides))


class CogVideoX15(CogVideoX):
    """Its tokens are patches of two frames, at whole positions in every size."""

    spec = COGVIDEOX15

    def _sides(self, grid: Grid) -> tuple[Tensor, Tensor]:
        rows, columns = (torch.arange(count, dtype=torch.float32) for count in (grid.rows, grid.columns))
        return rows.to(self.device), columns.to(self.device)


def _as_block(layer: Any) -> Block:
    def block(state: State) -> State:
        image, text = layer(
            hidden_states=state["image"],
            encoder_hidden_states=state["text"],
            temb=state.modulation,
            image_rotary_emb=state.rotary,
        )
        return state.with_streams(text=text, image=image)

    return block
