"""The common part of families whose image tokens attend to each other, then to a text that blocks do not change.

Every rank has all of the text, so that the attention to it needs no other rank. It is the same in every step and patch:
what the model makes of it is computed once, and kept as long as the condition that it belongs to.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..attention.site import KeySet, SiteId, Streams
from ..tokens.grid import Grid
from ..tokens.plan import Segment
from ..tokens.rotary import Rotary
from .blocks import PartlyCompiled
from .condition import Condition
from .family import Sites, TokenFamily
from .state import State


@dataclass
class CrossAttentionState(State):
    """`context` `[B or 1, St, C]`: the text that is attended to; `bias` `[B, 1, 1, St]`: added to its scores."""

    context: Tensor | None = None
    bias: Tensor | None = None


class SelfAttentionSite:
    """The processor of an attention of the tokens of `streams` to each other. They are all that its ranks hold.

    `across_heads`: norms are over all heads of a token, rather than over each.
    """

    def __init__(self, sites: Sites, site: SiteId, streams: Streams = ("image",), across_heads: bool = False) -> None:
        self.sites = sites
        self.site = site
        self.streams = streams
        self.across_heads = across_heads

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor:
        attention, streams = self.sites.attention, self.streams
        value = attention.send(_heads(attn, attn.to_v(hidden_states)), streams)
        key = _turned(_normed(attn, attn.norm_k, attn.to_k(hidden_states), self.across_heads), image_rotary_emb)
        sent_key = attention.send(key, streams)
        query = _turned(_normed(attn, attn.norm_q, attn.to_q(hidden_states), self.across_heads), image_rotary_emb)
        sent_query = attention.send(query, streams)
        attended = attention(self.site, sent_query, KeySet(sent_key, value)).flatten(2).to(hidden_states.dtype)
        return attn.to_out[0](attended)


class CrossAttentionSite:
    """The processor of an attention of this rank's image tokens to the text: its keys and values, `[B, H, St, D]`.

    `across_heads`: as in `SelfAttentionSite`.
    """

    def __init__(self, across_heads: bool = False) -> None:
        self.across_heads = across_heads

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor:
        query = _normed(attn, attn.norm_q, attn.to_q(hidden_states), self.across_heads)
        query = _turned(query, image_rotary_emb).transpose(1, 2)
        key, value = (each.expand(query.shape[0], -1, -1, -1) for each in encoder_hidden_states)
        # Kernels crash on a rank without image tokens.
        attended = (
            F.scaled_dot_product_attention(query, key, value, attention_mask)
            if query.numel()
            else torch.empty_like(query)
        )
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))


class TextOfBlock:
    """The keys and values that a block's attention makes of a text: made once, and kept as long as the text."""

    def __init__(self, attn: Any, across_heads: bool = False) -> None:
        """`across_heads`: as in `SelfAttentionSite`."""
        self._attn = attn
        self._across_heads = across_heads
        self.forget()

    def forget(self) -> None:
        self._kept = WeakTensorKeyDictionary()

    def __call__(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Projects `context` `[B or 1, St, C]` to keys and values, `[B or 1, H, St, D]` each."""
        if context not in self._kept:
            attn = self._attn
            key = _normed(attn, attn.norm_k, attn.to_k(context), self._across_heads).transpose(1, 2)
            self._kept[context] = key, _heads(attn, attn.to_v(context)).transpose(1, 2)
        return self._kept[context]


Compute = Callable[[CrossAttentionState, tuple[Tensor, Tensor], Tensor | None], Tensor]
"""Computes a block's tokens from the state before it, its text's keys and values, and the skip that it takes."""


@dataclass(frozen=True)
class CrossAttentionBlock(PartlyCompiled):
    """`compute` can be compiled: it is given the `text`, and of the skips only what the block takes in.

    `gives`, `takes`: the names under which its output is, or a skip was, left in the state. `stream`: of its tokens.
    """

    compute: Compute
    text: TextOfBlock
    gives: int | None = None
    takes: int | None = None
    stream: str = "image"

    def __call__(self, state: State) -> State:
        assert isinstance(state, CrossAttentionState)
        assert state.context is not None
        skips = dict(state.skips)
        tokens = self.compute(state, self.text(state.context), None if self.takes is None else skips.pop(self.takes))
        if self.gives is not None:
            skips[self.gives] = tokens
        return replace(state.with_streams(**{self.stream: tokens}), skips=skips)

    def compiled(self) -> CrossAttentionBlock:
        return replace(self, compute=torch.compile(self.compute))


class CrossAttentionFamily(TokenFamily):
    """The prelude is the context, `[B or 1, St, C]`: the text as all blocks attend to it.

    `across_heads`: as in `SelfAttentionSite`.
    """

    streams = ("image",)
    across_heads = False

    def adopt_network(self) -> None:
        self.texts = [TextOfBlock(layer.attn2, self.across_heads) for layer in self.layers]
        for number, layer in enumerate(self.layers):
            site = SelfAttentionSite(self.sites, (number, "self"), self.streams, self.across_heads)
            layer.attn1.set_processor(site)
            layer.attn2.set_processor(CrossAttentionSite(self.across_heads))

    @property
    @abstractmethod
    def layers(self) -> Sequence[Any]:
        """The model's blocks, with their attention to the image `attn1` and to the text `attn2`."""

    def forget_preludes(self) -> None:
        super().forget_preludes()
        for text in self.texts:
            text.forget()

    def segments(self, condition: Condition, grids: Mapping[str, Grid]) -> dict[str, list[Segment]]:
        return {self.controlled: [Segment.of(grids[self.controlled], self.controlled)]}


def _heads(attn: Any, x: Tensor) -> Tensor:
    """`[B, S, H * D]` -> `[B, S, H, D]`."""
    return x.unflatten(-1, (-1, attn.inner_dim // attn.heads))


def _normed(attn: Any, norm: nn.Module | None, x: Tensor, across_heads: bool) -> Tensor:
    """`[B, S, H * D]` -> `[B, S, H, D]`."""
    if norm is None:
        return _heads(attn, x)
    return _heads(attn, norm(x)) if across_heads else norm(_heads(attn, x))


def _turned(x: Tensor, rotation: Rotary | None) -> Tensor:
    return x if rotation is None else rotation.rotate(x)
