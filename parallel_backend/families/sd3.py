"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): joint attention, separate weights for text and image.

The last block gives no text. The first blocks of 3.5-medium have a second attention site, over the image alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from ..attention.site import Attention, Sent
from ..sampling.model_sampling import DiscreteFlow, ModelSampling
from ..tokens.plan import Shard
from .blocks import Block
from .condition import Condition, ShownPrompt, check_widths
from .family import Family
from .state import TokenState

SHIFT = 3.0


class Site:
    """The attention processor of one site: projections and norms here, the rest in `attention`.

    Without text it attends over the image alone. Values, keys and queries are sent in that order, each while the next
    is computed. Picture prompts are given those of the image, without their norms.
    """

    def __init__(self, attention: Attention, head_dim: int, number: int) -> None:
        self.attention = attention
        self.head_dim = head_dim
        self.number = number

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prompts: tuple[ShownPrompt, ...] = (),
    ) -> Tensor | tuple[Tensor, Tensor]:
        image, text = hidden_states, encoder_hidden_states
        own: list[Tensor] = []

        def heads(x: Tensor, project: nn.Module) -> Tensor:
            return project(x).unflatten(-1, (-1, self.head_dim))

        def normed(x: Tensor, norm: nn.Module | None) -> Tensor:
            return x if norm is None else norm(x)

        def send(project: Any, norm: Any, text_project: Any, text_norm: Any) -> Sent:
            of_image = heads(image, project)
            if prompts:
                own.append(of_image)
            of_image = normed(of_image, norm)
            if text is None:
                return self.attention.send(of_image, "image")
            return self.attention.send(torch.cat((normed(heads(text, text_project), text_norm), of_image), dim=1))

        value = send(attn.to_v, None, attn.add_v_proj, None)
        key = send(attn.to_k, attn.norm_k, attn.add_k_proj, attn.norm_added_k)
        query = send(attn.to_q, attn.norm_q, attn.add_q_proj, attn.norm_added_q)
        attended = self.attention(query, key, value).flatten(2).to(image.dtype)
        text_length = attended.shape[1] - image.shape[1]
        attended_text, attended_image = attended.split((text_length, image.shape[1]), dim=1)
        for prompt in prompts:
            attended_image = attended_image + prompt.added(self.number, own, self.attention)
        if text is None:
            return attn.to_out[0](attended_image)
        # The last block has no use for what the text has attended to.
        return attn.to_out[0](attended_image), attended_text if attn.context_pre_only else attn.to_add_out(
            attended_text
        )


class SD3(Family):
    name = "sd3"
    latent_channels = 16
    patch_size = 2
    latent_scale = 1.5305
    latent_shift = 0.0609

    def __init__(self, transformer: nn.Module, dtype: torch.dtype, device: torch.device, **latent: float) -> None:
        super().__init__(transformer, dtype, device, **latent)
        self.transformer = cast(SD3Transformer2DModel, transformer)
        self.max_side = self.transformer.config["pos_embed_max_size"]
        self.hidden_size = self.transformer.inner_dim
        self.blocks = [_as_block(layer) for layer in self.transformer.transformer_blocks]
        self.prompt_sites = [block for block, _ in self.sites()]
        self._positions = lru_cache(maxsize=2)(self._crop_positions)

    def use_attention(self, attention: Attention) -> None:
        for number, (_, attn) in enumerate(self.sites()):
            attn.set_processor(Site(attention, self.transformer.config["attention_head_dim"], number))

    def check_condition(self, condition: Condition) -> None:
        config = self.transformer.config
        widths = {"tokens": config["joint_attention_dim"], "pooled": config["pooled_projection_dim"]}
        check_widths(condition, widths, "Stable Diffusion 3", "CLIP-L, CLIP-G and T5-XXL")

    def model_sampling(self, shift: float | None) -> ModelSampling:
        return DiscreteFlow(shift=SHIFT if shift is None else shift)

    def embed(
        self, tokens: Tensor, timestep: Tensor, condition: Condition, shard: Shard, grid: tuple[int, int]
    ) -> TokenState:
        text = condition.tokens[:, shard.text].to(self.dtype).expand(tokens.shape[0], -1, -1)
        image = self.embed_image(tokens, shard, grid)
        return self.resume(image, self.transformer.context_embedder(text), timestep, condition, shard, grid)

    def embed_image(self, tokens: Tensor, shard: Shard, grid: tuple[int, int]) -> Tensor:
        """The image tokens in `shard`, embedded and with their positions."""
        # A convolution whose stride is its size is a matrix over the values of a token.
        project = self.transformer.pos_embed.proj
        image = F.linear(tokens[:, shard.image].to(self.dtype), project.weight.flatten(1), project.bias)
        return image + self._positions(grid)[shard.image]

    def resume(
        self, image: Tensor, text: Tensor, timestep: Tensor, condition: Condition, shard: Shard, grid: tuple[int, int]
    ) -> TokenState:
        assert condition.pooled is not None
        pooled = condition.pooled.to(self.dtype).expand(image.shape[0], -1)
        return TokenState(image=image, text=text, modulation=self.transformer.time_text_embed(timestep, pooled))

    def head(self, state: TokenState) -> Tensor:
        prediction = self.transformer.proj_out(self.transformer.norm_out(state.image, state.modulation))
        # The model's channels come last within a token, the latent's come first.
        return prediction.unflatten(-1, (self.patch_size**2, -1)).transpose(-1, -2).flatten(-2)

    def sites(self) -> list[tuple[int, Any]]:
        """The attention sites in the order of computation, each with the number of its block."""
        layers = enumerate(self.transformer.transformer_blocks)
        return [(block, attn) for block, layer in layers for attn in (layer.attn, layer.attn2) if attn is not None]

    def _crop_positions(self, grid: tuple[int, int]) -> Tensor:
        """`[S, h]`: the middle of the square of positions that the model was trained with."""
        side = cast(int, self.max_side)
        top, left = ((side - extent) // 2 for extent in grid)
        table = cast(Tensor, self.transformer.pos_embed.pos_embed)[0].unflatten(0, (side, side))
        return table[top : top + grid[0], left : left + grid[1]].flatten(0, 1).to(self.dtype)


def _as_block(layer: nn.Module) -> Block:
    block = cast(JointTransformerBlock, layer)

    def run(state: TokenState) -> TokenState:
        text, image = block(
            hidden_states=state.image,
            encoder_hidden_states=state.text,
            temb=state.modulation,
            joint_attention_kwargs={"prompts": state.prompts} if state.prompts else None,
        )
        return replace(state, image=image, text=state.text if text is None else text)

    return run
