"""What families have in common whose image tokens attend to each other, and then to a text that stays as it is.

Every rank has all of the text, so that the attention to it needs no other rank. It is the same in every step and patch:
what the model makes of it is computed once, and kept as long as the condition that it belongs to.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..attention.rotary import rotate
from ..attention.site import Attention
from .base import Condition, Family, TokenState


@dataclass
class CrossAttentionState(TokenState):
    """`context` `[B or 1, St, C]`: the text that is attended to; `bias` `[B, 1, 1, St]`: added to its scores."""

    context: Tensor | None = None
    bias: Tensor | None = None


class SelfAttentionSite:
    """The processor of an attention of image tokens to image tokens. They are all that its ranks hold."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Tensor:
        send = self.attention.send
        value = send(_heads(attn, attn.to_v, hidden_states))
        key = send(_turned(_normed(attn.norm_k, _heads(attn, attn.to_k, hidden_states)), image_rotary_emb))
        query = send(_turned(_normed(attn.norm_q, _heads(attn, attn.to_q, hidden_states)), image_rotary_emb))
        attended = self.attention(query, key, value).flatten(2).to(hidden_states.dtype)
        return attn.to_out[0](attended)


class CrossAttentionSite:
    """The processor of an attention of this rank's image tokens to the text, whose keys and values it keeps."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._kept = WeakTensorKeyDictionary()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Tensor:
        query = _turned(_normed(attn.norm_q, _heads(attn, attn.to_q, hidden_states)), image_rotary_emb).transpose(1, 2)
        if encoder_hidden_states not in self._kept:
            key = _normed(attn.norm_k, _heads(attn, attn.to_k, encoder_hidden_states)).transpose(1, 2)
            self._kept[encoder_hidden_states] = key, _heads(attn, attn.to_v, encoder_hidden_states).transpose(1, 2)
        key, value = (each.expand(query.shape[0], -1, -1, -1) for each in self._kept[encoder_hidden_states])
        # Kernels crash on a rank without image tokens.
        attended = (
            F.scaled_dot_product_attention(query, key, value, attention_mask)
            if query.numel()
            else torch.empty_like(query)
        )
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))


class CrossAttentionFamily(Family):
    """Image tokens are patches of a convolution; the last layer predicts `out_channels`, of which the first count.

    The others are those of a learned variance, which no sampler here uses.
    """

    latent_channels = 4
    patch_size = 2
    carries_text = False
    out_channels: int

    def __init__(
        self, transformer: nn.Module, dtype: torch.dtype, device: torch.device, **latent: float | None
    ) -> None:
        super().__init__(transformer, dtype, device, **latent)
        self._contexts: WeakKeyDictionary[Condition, Tensor] = WeakKeyDictionary()
        self._text_sites = [CrossAttentionSite() for _ in self.layers]

    @property
    @abstractmethod
    def layers(self) -> Sequence[Any]:
        """The model's blocks, with their attention to the image `attn1` and to the text `attn2`."""

    @abstractmethod
    def make_context(self, condition: Condition) -> Tensor:
        """The text `[B or 1, St, C]` as all blocks attend to it."""

    def context(self, condition: Condition) -> Tensor:
        if condition not in self._contexts:
            self._contexts[condition] = self.make_context(condition)
        return self._contexts[condition]

    def forget_texts(self) -> None:
        self._contexts.clear()
        for site in self._text_sites:
            site.forget()

    def use_attention(self, attention: Attention) -> None:
        for layer, site in zip(self.layers, self._text_sites, strict=True):
            layer.attn1.set_processor(SelfAttentionSite(attention))
            layer.attn2.set_processor(site)

    def embed_patches(self, projection: nn.Conv2d, tokens: Tensor) -> Tensor:
        """Latent tokens `[B, S, C * patch_size**2]` -> `[B, S, h]`."""
        return F.linear(tokens.to(self.dtype), projection.weight.flatten(1), projection.bias)

    def latent_tokens(self, output: Tensor) -> Tensor:
        """The last layer's `[B, S, patch_size**2 * out_channels]` -> `[B, S, C * patch_size**2]`."""
        by_place = output.unflatten(-1, (self.patch_size**2, self.out_channels))
        return by_place[..., : self.latent_channels].transpose(-1, -2).flatten(2)

    def no_text(self, like: Tensor) -> Tensor:
        return like.new_empty((like.shape[0], 0, like.shape[-1]))


def _heads(attn: Any, project: nn.Module, x: Tensor) -> Tensor:
    return project(x).unflatten(-1, (-1, attn.inner_dim // attn.heads))


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _turned(x: Tensor, rotation: Tensor | None) -> Tensor:
    return x if rotation is None else rotate(x, rotation)
