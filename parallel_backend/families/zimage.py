"""Z-Image (arXiv 2511.22699): one sequence of text and image, which blocks of their own refine before the joint ones.

Text and image are each filled up by a learned token, to a multiple of 32; all of these are attended to. The model's
time goes from noise to picture, and it predicts picture minus noise. ComfyUI normalises queries and keys with another
epsilon than diffusers, whose 1e-5 is used here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import TimestepEmbedder
from torch import Tensor

from ..attention.site import KeySet, SiteId, Streams
from ..sampling.model_sampling import DiscreteFlow, ModelSampling
from ..tokens.grid import Grid
from ..tokens.plan import Places, Segment
from ..tokens.rotary import Rotary, rotations_at
from .blocks import Block
from .condition import Condition, check_widths
from .family import Sites, TokenFamily
from .joint import STREAMS, Place, join, own_rotary, part
from .keys.zimage import PAD_MULTIPLE, ZIMAGE
from .state import Evaluation, State

SHIFT = 3.0
PATCH = "2-1"
"""The name of the layers for tokens of 2 x 2 cells of one frame."""


class Site:
    """The processor of an attention of the tokens of `streams` to each other."""

    def __init__(self, sites: Sites, site: SiteId, streams: Streams, head_dim: int) -> None:
        self.sites = sites
        self.site = site
        self.streams = streams
        self.head_dim = head_dim

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: None, attention_mask: None, freqs_cis: Rotary
    ) -> Tensor:
        attention, rotate = self.sites.attention, freqs_cis.rotate

        def heads(project: Any) -> Tensor:
            return project(hidden_states).unflatten(-1, (-1, self.head_dim))

        value = attention.send(heads(attn.to_v), self.streams)
        key = attention.send(rotate(attn.norm_k(heads(attn.to_k))), self.streams)
        query = attention.send(rotate(attn.norm_q(heads(attn.to_q))), self.streams)
        attended = attention(self.site, query, KeySet(key, value)).flatten(2).to(hidden_states.dtype)
        return attn.to_out[0](attended)


class ZImage(TokenFamily):
    """Its first blocks each refine the image, and by layers of their own the text."""

    spec = ZIMAGE

    def adopt_network(self) -> None:
        model, config = self.transformer, self.transformer.config
        self.hidden_size = config["dim"]
        self.head_dim: int = config["dim"] // config["n_heads"]
        refiners = list(zip(model.noise_refiner, model.context_refiner, strict=True))
        for number, (of_image, of_text) in enumerate(refiners):
            self._install(of_image, (number, "image"), ("image",))
            self._install(of_text, (number, "text"), ("text",))
        for number, layer in enumerate(model.layers, len(refiners)):
            self._install(layer, (number, "joint"), STREAMS)
        self.blocks = [*(_refiner(*pair) for pair in refiners), *map(_joint, model.layers)]
        self._rotary = lru_cache(maxsize=8)(self._compute_rotary)

    def _install(self, layer: Any, site: SiteId, streams: Streams) -> None:
        layer.attention.set_processor(Site(self.sites, site, streams, self.head_dim))

    def check_condition(self, condition: Condition) -> None:
        check_widths(condition, {"tokens": self.transformer.config["cap_feat_dim"]}, self.spec)

    def model_sampling(self, shift: float | None) -> ModelSampling:
        return DiscreteFlow(shift=SHIFT if shift is None else shift, multiplier=1.0)

    def segments(self, condition: Condition, grids: Mapping[str, Grid]) -> dict[str, list[Segment]]:
        grid = grids["image"]
        return {
            "text": [Segment(_filled(condition["tokens"].shape[1]))],
            "image": [Segment.of(grid, "image"), Segment(_filled(grid.count) - grid.count)],
        }

    def make_prelude(self, condition: Condition) -> Tensor:
        """The text with its pads, `[B or 1, St, h]`."""
        text = self.transformer.cap_embedder(condition["tokens"].to(self.dtype))
        return self._fill(text, self.transformer.cap_pad_token)

    def embed(self, evaluation: Evaluation) -> State:
        model, shard = self.transformer, evaluation.shard
        text = self.prelude(evaluation.condition)[:, shard["text"]].expand(evaluation.batch, -1, -1)
        image = model.all_x_embedder[PATCH](evaluation.tokens["image"].to(self.dtype))
        return self.resume(evaluation, {"text": text, "image": self._fill(image, model.x_pad_token)[:, shard["image"]]})

    def resume(self, evaluation: Evaluation, streams: dict[str, Tensor]) -> State:
        model = self.transformer
        sines = TimestepEmbedder.timestep_embedding(
            (1 - evaluation.timestep) * model.t_scale, model.t_embedder.frequency_embedding_size
        )
        text_length = _filled(evaluation.condition["tokens"].shape[1])
        rotary = own_rotary(self._rotary(text_length, evaluation.grids["image"]), text_length, evaluation.shard)
        return State(streams, model.t_embedder.mlp(sines.to(self.dtype)), rotary)

    def modulated_input(self, state: State) -> Tensor:
        layer = self.transformer.noise_refiner[0]
        scale = layer.adaLN_modulation(state.modulation).unsqueeze(1).chunk(4, dim=2)[0]
        return layer.attention_norm1(state["image"]) * (1 + scale)

    def head(self, state: State, predicted: Mapping[str, Places]) -> dict[str, Tensor]:
        image = state["image"][:, predicted["image"]]
        return {"image": -self.transformer.all_final_layer[PATCH](image, c=state.modulation)}

    def _fill(self, tokens: Tensor, pad: Tensor) -> Tensor:
        batch, count, _ = tokens.shape
        return torch.cat((tokens, pad.to(self.dtype).expand(batch, _filled(count) - count, -1)), dim=1)

    def _compute_rotary(self, text_length: int, grid: Grid) -> Tensor:
        """Rotations `[St + S, 1, D / 2, 2]`: the text's tokens are counted from 1, its pads too, and the image's, by
        their rows and columns, all follow it. Pads of the image are at 0."""
        ids = torch.zeros(text_length + _filled(grid.count), 3, device=self.device)
        ids[:text_length, 0] = torch.arange(1, text_length + 1)
        picture = Place(text_length + 1, 0, 0, grid.rows, grid.columns)
        ids[text_length:][: grid.count] = picture.ids(self.device)
        return rotations_at(ids, self.transformer.axes_dims, self.transformer.rope_theta)


def _filled(count: int) -> int:
    """How many tokens `count` become with their pads."""
    return -(-count // PAD_MULTIPLE) * PAD_MULTIPLE


def _refiner(of_image: Any, of_text: Any) -> Block:
    def block(state: State) -> State:
        assert state.rotary is not None
        text, image = state["text"], state["image"]
        length = text.shape[1]
        text = of_text(text, None, state.rotary.of(slice(length)))
        image = of_image(image, None, state.rotary.of(slice(length, None)), state.modulation)
        return state.with_streams(text=text, image=image)

    return block


def _joint(layer: Any) -> Block:
    def block(state: State) -> State:
        return part(state, layer(join(state), None, state.rotary, state.modulation))

    return block
