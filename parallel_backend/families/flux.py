"""Flux.1 (schnell, dev): joint attention; double blocks with separate text and image weights, then single blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
)
from torch import Tensor, nn

from ..attention.site import KeySet
from ..sampling.model_sampling import DiscreteFlow, FluxFlow, ModelSampling
from ..tokens.grid import Grid, tokenise
from ..tokens.plan import Places, Segment
from ..tokens.rotary import Rotary, rotations
from .blocks import Block
from .condition import Condition, TimedImagePrompt, check_widths
from .family import Sites, TokenFamily
from .keys.flux import FLUX
from .state import Evaluation, State

STREAMS = ("text", "image")
"""The streams of every site, in this order."""


class JointSite:
    """The attention processor of a double block: projections, norms and rotary embedding here, the rest in `sites`.

    Values, keys and queries are sent in that order, each while the next is computed. Picture prompts are given the
    image's queries with their norm, and before their turn.
    """

    def __init__(self, sites: Sites, block: int) -> None:
        self.sites = sites
        self.block = block

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None,
        image_rotary_emb: Rotary,
        prompts: tuple[TimedImagePrompt, ...] = (),
    ) -> tuple[Tensor, ...]:
        text, image, attention = encoder_hidden_states, hidden_states, self.sites.attention
        rotate = image_rotary_emb.rotate

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, attn.head_dim))

        value = attention.send(torch.cat((heads(attn.add_v_proj(text)), heads(attn.to_v(image))), dim=1), STREAMS)
        text_key = attn.norm_added_k(heads(attn.add_k_proj(text)))
        key = attention.send(rotate(torch.cat((text_key, attn.norm_k(heads(attn.to_k(image)))), dim=1)), STREAMS)
        text_query, own_query = attn.norm_added_q(heads(attn.add_q_proj(text))), attn.norm_q(heads(attn.to_q(image)))
        query = attention.send(rotate(torch.cat((text_query, own_query), dim=1)), STREAMS)
        attended = attention((self.block, "joint"), query, KeySet(key, value)).flatten(2).to(image.dtype)
        attended_text, attended_image = attended.split((text.shape[1], image.shape[1]), dim=1)
        outputs = attn.to_out[0](attended_image), attn.to_add_out(attended_text)
        added = [each.added((self.block, "joint"), self.block, [own_query], attention) for each in prompts]
        # The block adds a third output to the image tokens when it is done with them.
        return (*outputs, sum(added[1:], start=added[0])) if added else outputs


class SingleBlock:
    """A single block with its feed-forward between sending and attending: the exchange goes on behind it."""

    def __init__(self, layer: FluxSingleTransformerBlock, sites: Sites, block: int) -> None:
        self.layer = layer
        self.sites = sites
        self.block = block

    def __call__(self, state: State) -> State:
        layer, attention = self.layer, self.sites.attention
        attn, rotary = layer.attn, cast(Rotary, state.rotary)
        text, image = state["text"], state["image"]
        hidden = torch.cat((text, image), dim=1)
        normed, gate = layer.norm(hidden, emb=state.modulation)

        def heads(project: nn.Module) -> Tensor:
            return project(normed).unflatten(-1, (-1, attn.head_dim))

        value = attention.send(heads(attn.to_v), STREAMS)
        key = attention.send(rotary.rotate(attn.norm_k(heads(attn.to_k))), STREAMS)
        query = attention.send(rotary.rotate(attn.norm_q(heads(attn.to_q))), STREAMS)
        feed_forward = layer.act_mlp(layer.proj_mlp(normed))
        attended = attention((self.block, "joint"), query, KeySet(key, value)).flatten(2).to(hidden.dtype)
        hidden = hidden + gate.unsqueeze(1) * layer.proj_out(torch.cat((attended, feed_forward), dim=2))
        if hidden.dtype == torch.float16:
            hidden = hidden.clip(-65504, 65504)
        text, image = hidden.split((text.shape[1], image.shape[1]), dim=1)
        return state.with_streams(text=text, image=image)


class Place(NamedTuple):
    """The positions of a picture's tokens: `first` on the first axis of positions, rows and columns on the others."""

    first: int
    top: int
    left: int
    rows: int
    columns: int

    def ids(self, device: torch.device) -> Tensor:
        """`[rows * columns, 3]`, row by row."""
        ids = torch.empty(self.rows, self.columns, 3, device=device)
        ids[..., 0] = self.first
        ids[..., 1] = torch.arange(self.top, self.top + self.rows, device=device)[:, None]
        ids[..., 2] = torch.arange(self.left, self.left + self.columns, device=device)
        return ids.flatten(0, 1)


class Flux(TokenFamily):
    spec = FLUX

    def adopt_network(self) -> None:
        self.transformer = cast(FluxTransformer2DModel, self.transformer)
        self.hidden_size = self.transformer.inner_dim
        double, single = self.transformer.transformer_blocks, self.transformer.single_transformer_blocks
        for number, layer in enumerate(double):
            cast(Any, layer.attn).set_processor(JointSite(self.sites, number))
        singles = [SingleBlock(layer, self.sites, number) for number, layer in enumerate(single, len(double))]
        self.blocks = [*map(_double_block, double), *singles]
        self.prompt_sites = range(len(double))
        self._rotary = lru_cache(maxsize=32)(self._compute_rotary)

    @property
    def input_channels(self) -> int:
        return self.transformer.config["in_channels"] // math.prod(self.latent.patch)

    def check_condition(self, condition: Condition) -> None:
        config = self.transformer.config
        widths = {"tokens": config["joint_attention_dim"], "pooled": config["pooled_projection_dim"]}
        check_widths(condition, widths, self.spec)

    def model_sampling(self, shift: float | None) -> ModelSampling:
        # Only dev is distilled with guidance and trained with a shifted clock; schnell's runs straight.
        if self.transformer.config["guidance_embeds"]:
            return FluxFlow() if shift is None else FluxFlow(shift=shift)
        return DiscreteFlow(shift=1.0 if shift is None else shift, multiplier=1.0)

    def segments(self, condition: Condition, grids: Mapping[str, Grid]) -> dict[str, list[Segment]]:
        patch = self.latent.patch
        references = [Segment(Grid.of(each.shape[2:], patch).count) for each in condition.references]
        return {
            "text": [Segment(condition["tokens"].shape[1])],
            "image": [Segment.of(grids["image"], "image"), *references],
        }

    def embed(self, evaluation: Evaluation) -> State:
        model, condition, shard = self.transformer, evaluation.condition, evaluation.shard
        tokens = evaluation.tokens["image"]
        if condition.references:
            pictures = (each.to(tokens).expand(evaluation.batch, -1, -1, -1) for each in condition.references)
            tokens = torch.cat([tokens, *(tokenise(each, self.latent.patch) for each in pictures)], dim=1)
        text = condition["tokens"][:, shard["text"]].to(self.dtype).expand(evaluation.batch, -1, -1)
        image = model.x_embedder(tokens[:, shard["image"]].to(self.dtype))
        return self.resume(evaluation, {"text": model.context_embedder(text), "image": image})

    def resume(self, evaluation: Evaluation, streams: dict[str, Tensor]) -> State:
        model, condition, shard = self.transformer, evaluation.condition, evaluation.shard
        timestep = evaluation.timestep.to(self.dtype) * 1000
        pooled = condition["pooled"].to(self.dtype).expand(evaluation.batch, -1)
        if not model.config["guidance_embeds"]:
            modulation = model.time_text_embed(timestep, pooled)
        elif condition.guidance is None:
            embed = cast(Any, model.time_text_embed)
            modulation = embed.timestep_embedder(embed.time_proj(timestep).to(self.dtype)) + embed.text_embedder(pooled)
        else:
            guidance = torch.full_like(timestep, condition.guidance) * 1000
            modulation = model.time_text_embed(timestep, guidance, pooled)
        grid, text_length = evaluation.grids["image"], condition["tokens"].shape[1]
        picture = Place(0, 0, 0, grid.rows, grid.columns)
        rotary = self._rotary(text_length, (picture, *self._reference_places(condition, grid)))
        own = torch.cat((rotary[:text_length][shard["text"]], rotary[text_length:][shard["image"]]))
        return State(streams, modulation, Rotary(own))

    def head(self, state: State, predicted: Mapping[str, Places]) -> dict[str, Tensor]:
        image = state["image"][:, predicted["image"]]
        return {"image": self.transformer.proj_out(self.transformer.norm_out(image, state.modulation))}

    def _reference_places(self, condition: Condition, grid: Grid) -> list[Place]:
        """The positions of the references, by the rule that the condition names.

        "index": each at the picture's own rows and columns, at the next position of the first axis. "offset": all at
        position 1, each right of those before or below them, whichever keeps the whole smaller. "uxo" (UNO, arXiv
        2504.02160): each right below the one before, the first right below the picture.
        """
        patch = self.latent.patch[1]
        places: list[Place] = []
        bottom = right = 0
        for number, reference in enumerate(condition.references, start=1):
            height, width = reference.shape[-2:]
            first = top = left = 0
            if condition.reference_places == "index":
                first = number
            elif condition.reference_places == "uxo":
                top, left = grid.rows * patch + bottom, grid.columns * patch + right
                bottom, right = bottom + height, right + width
            else:
                first = 1
                top, left = (0, right) if height + bottom > width + right else (bottom, 0)
                bottom, right = max(bottom, height + top), max(right, width + left)
            corner_and_size = (-(-cells // patch) for cells in (top, left, height, width))
            places.append(Place(first, *corner_and_size))
        return places

    def _compute_rotary(self, text_length: int, places: tuple[Place, ...]) -> Tensor:
        """Rotations `[St + S, 1, D / 2, 2]`: text tokens sit at position 0, image tokens at their row and column."""
        ids = [torch.zeros(text_length, 3, device=self.device), *(place.ids(self.device) for place in places)]
        return rotations(*self.transformer.pos_embed(torch.cat(ids)))


def _double_block(layer: nn.Module) -> Block:
    def block(state: State) -> State:
        text, image = layer(
            hidden_states=state["image"],
            encoder_hidden_states=state["text"],
            temb=state.modulation,
            image_rotary_emb=state.rotary,
            joint_attention_kwargs={"prompts": state.prompts} if state.prompts else None,
        )
        return state.with_streams(text=text, image=image)

    return block
