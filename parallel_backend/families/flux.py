"""Flux.1 (schnell, dev): joint attention; double blocks with separate text and image weights, then single blocks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxTransformer2DModel
from torch import Tensor, nn

from ..attention.core import Attention
from ..attention.rotary import rotate, rotations
from ..errors import UserError
from ..sampling.model_sampling import DiscreteFlow, FluxFlow, ModelSampling
from .base import Block, Condition, Family, Shard, TokenState

DEFAULT_GUIDANCE = 3.5


class FluxSite:
    """The attention processor of one site: projections, norms and rotary embedding here, the rest in `attention`."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        heads = (-1, attn.head_dim)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, heads))
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, heads))
        value = attn.to_v(hidden_states).unflatten(-1, heads)
        text_length = 0
        if encoder_hidden_states is not None:
            text_length = encoder_hidden_states.shape[1]
            text_query = attn.norm_added_q(attn.add_q_proj(encoder_hidden_states).unflatten(-1, heads))
            text_key = attn.norm_added_k(attn.add_k_proj(encoder_hidden_states).unflatten(-1, heads))
            text_value = attn.add_v_proj(encoder_hidden_states).unflatten(-1, heads)
            query = torch.cat((text_query, query), dim=1)
            key = torch.cat((text_key, key), dim=1)
            value = torch.cat((text_value, value), dim=1)
        if image_rotary_emb is not None:
            query = rotate(query, image_rotary_emb)
            key = rotate(key, image_rotary_emb)
        attended = self.attention(query, key, value).flatten(2).to(query.dtype)
        if encoder_hidden_states is None:
            return attended
        text, image = attended[:, :text_length], attended[:, text_length:]
        return attn.to_out[0](image), attn.to_add_out(text)


class Flux(Family):
    name = "flux"
    latent_channels = 16
    patch_size = 2

    def __init__(
        self,
        transformer: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        latent_scale: float = 0.3611,
        latent_shift: float = 0.1159,
    ) -> None:
        super().__init__(dtype, device)
        self.transformer = cast(FluxTransformer2DModel, transformer)
        self.latent_scale = latent_scale
        self.latent_shift = latent_shift
        self.hidden_size = self.transformer.inner_dim
        self.blocks = [_as_block(layer) for layer in self._layers()]
        self._rotary = lru_cache(maxsize=8)(self._compute_rotary)

    def use_attention(self, attention: Attention) -> None:
        for layer in self._layers():
            cast(Any, layer.attn).set_processor(FluxSite(attention))

    def check_condition(self, condition: Condition) -> None:
        config = self.transformer.config
        found = (condition.tokens.shape[-1], condition.pooled.shape[-1])
        wanted = (config["joint_attention_dim"], config["pooled_projection_dim"])
        if found != wanted:
            raise UserError(
                f"The conditioning has text tokens of width {found[0]} and a pooled vector of {found[1]}; "
                f"this Flux model takes {wanted[0]} and {wanted[1]}.",
                "Encode the prompt with the text encoders that belong to the model (CLIP-L and T5-XXL for Flux.1).",
            )

    def model_sampling(self, shift: float | None) -> ModelSampling:
        # Only dev is distilled with guidance and trained with a shifted clock; schnell's runs straight.
        if self.transformer.config["guidance_embeds"]:
            return FluxFlow() if shift is None else FluxFlow(shift=shift)
        return DiscreteFlow(shift=1.0 if shift is None else shift, multiplier=1.0)

    def process_in(self, latent: Tensor) -> Tensor:
        return (latent - self.latent_shift) * self.latent_scale

    def process_out(self, latent: Tensor) -> Tensor:
        return latent / self.latent_scale + self.latent_shift

    def tokenize(self, latent: Tensor) -> Tensor:
        patch = self.patch_size
        height, width = latent.shape[-2:]
        if height % patch or width % patch:
            # Wrapping around is what the reference implementations do with a half patch at the border.
            latent = F.pad(latent, (0, -width % patch, 0, -height % patch), mode="circular")
        return F.pixel_unshuffle(latent, patch).flatten(2).transpose(1, 2)

    def untokenize(self, tokens: Tensor, height: int, width: int) -> Tensor:
        rows, columns = -(-height // self.patch_size), -(-width // self.patch_size)
        latent = F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), self.patch_size)
        return latent[..., :height, :width]

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
        pooled = condition.pooled.to(self.dtype).expand(image.shape[0], -1)
        if model.config["guidance_embeds"]:
            strength = DEFAULT_GUIDANCE if condition.guidance is None else condition.guidance
            guidance = torch.full_like(timestep, strength) * 1000
            modulation = model.time_text_embed(timestep, guidance, pooled)
        else:
            modulation = model.time_text_embed(timestep, pooled)
        text_length = condition.tokens.shape[1]
        rotary = self._rotary(text_length, grid)
        return TokenState(
            image=image,
            text=text,
            modulation=modulation,
            rotary=torch.cat((rotary[:text_length][shard.text], rotary[text_length:][shard.image])),
        )

    def head(self, state: TokenState) -> Tensor:
        return self.transformer.proj_out(self.transformer.norm_out(state.image, state.modulation))

    def _layers(self) -> list[nn.Module]:
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def _compute_rotary(self, text_length: int, grid: tuple[int, int]) -> Tensor:
        """Rotations `[St + S, D / 2]`: text tokens sit at position 0, image tokens at their row and column."""
        rows, columns = grid
        ids = torch.zeros(text_length + rows * columns, 3, device=self.device)
        ids[text_length:, 1] = torch.arange(rows, device=self.device).repeat_interleave(columns)
        ids[text_length:, 2] = torch.arange(columns, device=self.device).repeat(rows)
        return rotations(*self.transformer.pos_embed(ids))


def _as_block(layer: nn.Module) -> Block:
    def block(state: TokenState) -> TokenState:
        text, image = layer(
            hidden_states=state.image,
            encoder_hidden_states=state.text,
            temb=state.modulation,
            image_rotary_emb=state.rotary,
        )
        return TokenState(image=image, text=text, modulation=state.modulation, rotary=state.rotary)

    return block
