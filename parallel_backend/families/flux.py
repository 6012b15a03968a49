"""Flux.1 (schnell, dev): joint attention; double blocks with separate text and image weights, then single blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
)
from torch import Tensor, nn

from ..attention.site import Attention
from ..sampling.model_sampling import DiscreteFlow, FluxFlow, ModelSampling
from ..tokens.plan import Shard
from ..tokens.rotary import rotate, rotations
from .blocks import Block
from .condition import Condition, ShownPrompt, check_widths
from .family import Family
from .state import TokenState


class JointSite:
    """The attention processor of a double block: projections, norms and rotary embedding here, the rest in `attention`.

    Values, keys and queries are sent in that order, each while the next is computed. Picture prompts are given the
    image's queries with their norm, and before their turn.
    """

    def __init__(self, attention: Attention, number: int) -> None:
        self.attention = attention
        self.number = number

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None,
        image_rotary_emb: Tensor,
        prompts: tuple[ShownPrompt, ...] = (),
    ) -> tuple[Tensor, ...]:
        text, image, rotary, send = encoder_hidden_states, hidden_states, image_rotary_emb, self.attention.send

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, attn.head_dim))

        value = send(torch.cat((heads(attn.add_v_proj(text)), heads(attn.to_v(image))), dim=1))
        text_key = attn.norm_added_k(heads(attn.add_k_proj(text)))
        key = send(rotate(torch.cat((text_key, attn.norm_k(heads(attn.to_k(image)))), dim=1), rotary))
        text_query, own_query = attn.norm_added_q(heads(attn.add_q_proj(text))), attn.norm_q(heads(attn.to_q(image)))
        query = send(rotate(torch.cat((text_query, own_query), dim=1), rotary))
        attended = self.attention(query, key, value).flatten(2).to(image.dtype)
        attended_text, attended_image = attended.split((text.shape[1], image.shape[1]), dim=1)
        outputs = attn.to_out[0](attended_image), attn.to_add_out(attended_text)
        added = [each.added(self.number, [own_query], self.attention) for each in prompts]
        # The block adds a third output to the image tokens when it is done with them.
        return (*outputs, sum(added[1:], start=added[0])) if added else outputs


class SingleBlock:
    """A single block with its feed-forward between sending and attending: the exchange goes on behind it."""

    def __init__(self, layer: FluxSingleTransformerBlock) -> None:
        self.layer = layer
        self.attention: Attention | None = None

    def __call__(self, state: TokenState) -> TokenState:
        layer, attend = self.layer, self.attention
        assert attend is not None
        attn, rotary = layer.attn, cast(Tensor, state.rotary)
        hidden = torch.cat((state.text, state.image), dim=1)
        normed, gate = layer.norm(hidden, emb=state.modulation)

        def heads(project: nn.Module) -> Tensor:
            return project(normed).unflatten(-1, (-1, attn.head_dim))

        value = attend.send(heads(attn.to_v))
        key = attend.send(rotate(attn.norm_k(heads(attn.to_k)), rotary))
        query = attend.send(rotate(attn.norm_q(heads(attn.to_q)), rotary))
        feed_forward = layer.act_mlp(layer.proj_mlp(normed))
        attended = attend(query, key, value).flatten(2).to(hidden.dtype)
        hidden = hidden + gate.unsqueeze(1) * layer.proj_out(torch.cat((attended, feed_forward), dim=2))
        if hidden.dtype == torch.float16:
            hidden = hidden.clip(-65504, 65504)
        text, image = hidden.split((state.text.shape[1], state.image.shape[1]), dim=1)
        return replace(state, text=text, image=image)


class Place(NamedTuple):
    """Where the tokens of a picture are: at `first` on the first axis of positions, rows and columns on the others."""

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


class Flux(Family):
    name = "flux"
    latent_channels = 16
    patch_size = 2
    latent_scale = 0.3611
    latent_shift = 0.1159
    takes_references = True

    def __init__(self, transformer: nn.Module, dtype: torch.dtype, device: torch.device, **latent: float) -> None:
        super().__init__(transformer, dtype, device, **latent)
        self.transformer = cast(FluxTransformer2DModel, transformer)
        self.hidden_size = self.transformer.inner_dim
        self._single_blocks = [SingleBlock(layer) for layer in self.transformer.single_transformer_blocks]
        self.blocks = [*map(_double_block, self.transformer.transformer_blocks), *self._single_blocks]
        self.prompt_sites = range(len(self.transformer.transformer_blocks))
        self._rotary = lru_cache(maxsize=32)(self._compute_rotary)

    @property
    def input_channels(self) -> int:
        return self.transformer.config["in_channels"] // self.patch_size**2

    def use_attention(self, attention: Attention) -> None:
        for number, layer in enumerate(self.transformer.transformer_blocks):
            cast(Any, layer.attn).set_processor(JointSite(attention, number))
        for block in self._single_blocks:
            block.attention = attention

    def check_condition(self, condition: Condition) -> None:
        config = self.transformer.config
        widths = {"tokens": config["joint_attention_dim"], "pooled": config["pooled_projection_dim"]}
        check_widths(condition, widths, "Flux", "CLIP-L and T5-XXL for Flux.1")

    def model_sampling(self, shift: float | None) -> ModelSampling:
        # Only dev is distilled with guidance and trained with a shifted clock; schnell's runs straight.
        if self.transformer.config["guidance_embeds"]:
            return FluxFlow() if shift is None else FluxFlow(shift=shift)
        return DiscreteFlow(shift=1.0 if shift is None else shift, multiplier=1.0)

    def embed(
        self, tokens: Tensor, timestep: Tensor, condition: Condition, shard: Shard, grid: tuple[int, int]
    ) -> TokenState:
        text = condition.tokens[:, shard.text].to(self.dtype).expand(tokens.shape[0], -1, -1)
        image = self.transformer.x_embedder(tokens[:, shard.image].to(self.dtype))
        return self.resume(image, self.transformer.context_embedder(text), timestep, condition, shard, grid)

    def resume(
        self, image: Tensor, text: Tensor, timestep: Tensor, condition: Condition, shard: Shard, grid: tuple[int, int]
    ) -> TokenState:
        model = self.transformer
        timestep = timestep.to(self.dtype) * 1000
        assert condition.pooled is not None
        pooled = condition.pooled.to(self.dtype).expand(image.shape[0], -1)
        if not model.config["guidance_embeds"]:
            modulation = model.time_text_embed(timestep, pooled)
        elif condition.guidance is None:
            embed = cast(Any, model.time_text_embed)
            modulation = embed.timestep_embedder(embed.time_proj(timestep).to(self.dtype)) + embed.text_embedder(pooled)
        else:
            guidance = torch.full_like(timestep, condition.guidance) * 1000
            modulation = model.time_text_embed(timestep, guidance, pooled)
        text_length = condition.tokens.shape[1]
        rotary = self._rotary(text_length, (Place(0, 0, 0, *grid), *self._reference_places(condition, grid)))
        return TokenState(
            image=image,
            text=text,
            modulation=modulation,
            rotary=torch.cat((rotary[:text_length][shard.text], rotary[text_length:][shard.image])),
        )

    def head(self, state: TokenState) -> Tensor:
        return self.transformer.proj_out(self.transformer.norm_out(state.image, state.modulation))

    def _reference_places(self, condition: Condition, grid: tuple[int, int]) -> list[Place]:
        """Where the references are, by the rule that the condition names.

        "index": each at the picture's own rows and columns, at the next position of the first axis. "offset": all at
        position 1, each right of those before or below them, whichever keeps the whole smaller. "uxo" (UNO, arXiv
        2504.02160): each right below the one before, the first right below the picture.
        """
        patch = self.patch_size
        places: list[Place] = []
        bottom = right = 0
        for number, reference in enumerate(condition.references, start=1):
            height, width = reference.shape[-2:]
            first = top = left = 0
            if condition.reference_places == "index":
                first = number
            elif condition.reference_places == "uxo":
                top, left = grid[0] * patch + bottom, grid[1] * patch + right
                bottom, right = bottom + height, right + width
            else:
                first = 1
                top, left = (0, right) if height + bottom > width + right else (bottom, 0)
                bottom, right = max(bottom, height + top), max(right, width + left)
            corner_and_size = (-(-cells // patch) for cells in (top, left, height, width))
            places.append(Place(first, *corner_and_size))
        return places

    def _compute_rotary(self, text_length: int, places: tuple[Place, ...]) -> Tensor:
        """Rotations `[St + S, D / 2, 2]`: text tokens sit at position 0, image tokens at their row and column."""
        ids = [torch.zeros(text_length, 3, device=self.device), *(place.ids(self.device) for place in places)]
        return rotations(*self.transformer.pos_embed(torch.cat(ids)))


def _double_block(layer: nn.Module) -> Block:
    def block(state: TokenState) -> TokenState:
        text, image = layer(
            hidden_states=state.image,
            encoder_hidden_states=state.text,
            temb=state.modulation,
            image_rotary_emb=state.rotary,
            joint_attention_kwargs={"prompts": state.prompts} if state.prompts else None,
        )
        return replace(state, image=image, text=text)

    return block
