"""Attention over sequence-parallel ranks: local, Ulysses, ring and their hybrid (USP), with uneven tokens and heads.

Sources: Ulysses (arXiv 2309.14509), ring attention (arXiv 2310.01889), their hybrid USP (arXiv 2405.07719).
Every rank holds some tokens of all heads. An all-to-all within the Ulysses axis trades them for some heads of the
chunk of tokens that the axis holds together; keys and values of the other chunks then pass by on the ring axis.
Attention does not depend on the order of the keys, so each rank's tokens may be any mixture of text and image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed.axis import Axis
from ..layout.layout import AttentionKernel
from ..layout.split import split_sizes
from ..tokens.plan import Tokens, lengths_by_tokens
from .kernels import Kernel, select_kernel
from .site import Attention, KeysValues, Sent
from .yunchang import YunchangAttention


def make_attention(
    name: AttentionKernel, ulysses: Axis, ring: Axis, device: torch.device, dtype: torch.dtype
) -> Attention:
    """Attention over the ranks of both axes by the kernel `name`. Raises `UserError` when it cannot run here."""
    if name == "yunchang":
        return YunchangAttention(ulysses, ring, device, dtype)
    return AttentionCore(ulysses, ring, select_kernel(name, device, dtype, with_lse=ring.size > 1))


class AttentionCore:
    """Called by every attention site of a model with this rank's tokens of all heads, `[B, S, H, D]`."""

    keeps = False

    def __init__(self, ulysses: Axis, ring: Axis, kernel: Kernel) -> None:
        self.ulysses = ulysses
        self.ring = ring
        self.kernel = kernel
        self._lengths: dict[Tokens, list[int]] = {}

    def set_lengths(self, text: Sequence[int], image: Sequence[int]) -> None:
        ranks = self.ulysses.size * self.ring.size
        if (len(text), len(image)) != (ranks, ranks):
            raise ValueError(f"{len(text)} and {len(image)} lengths for {ranks} sequence-parallel ranks")
        self._lengths = lengths_by_tokens(text, image)

    def __call__(self, q: Sent, k: Sent, v: Sent, beside: KeysValues | None = None) -> Tensor:
        """Attention of this rank's queries over all ranks' keys and values: its own tokens, `[B, S, H, D]`."""
        size, lengths = self.ulysses.size, self._lengths[q.tokens]
        chunks = [sum(lengths[index * size : (index + 1) * size]) for index in range(self.ring.size)]
        # The values were sent first and are here first.
        values = v.wait()
        keys_values = (k.wait(), values)
        return self.gather(self.attend(q.wait(), keys_values, chunks, beside), q)

    def send(self, x: Tensor, tokens: Tokens = "all") -> Sent:
        """Start to trade this rank's tokens of all heads, `[B, S, H, D]`, for all tokens of some heads."""
        if self.ulysses.size == 1:
            return Sent(x, tokens)
        batch, length, heads, dim = x.shape
        head_counts = split_sizes(heads, self.ulysses.size)
        own_heads = head_counts[self.ulysses.rank]
        lengths = self._chunk_lengths(tokens)
        # Tokens first: what comes from the ranks of the axis is then one tensor of all their tokens, without a copy.
        row = batch * dim
        sizes = [length * count * row for count in head_counts]
        outgoing = x.new_empty(sum(sizes))
        for target, part in zip(outgoing.split(sizes), x.split(head_counts, dim=2), strict=True):
            target.view(length, part.shape[2], batch, dim).copy_(part.permute(1, 2, 0, 3))
        exchange = self.ulysses.start_all_to_all(
            outgoing,
            sizes,
            [extent * own_heads * row for extent in lengths],
        )
        return Sent(x, tokens, exchange, sum(lengths), own_heads)

    def attend(
        self,
        q: Tensor,
        keys_values: Tensor | tuple[Tensor, Tensor],
        chunks: Sequence[int],
        beside: KeysValues | None = None,
    ) -> Tensor:
        """Queries over this chunk's keys and values, and over those of the ring's other chunks, `chunks` long each.

        `beside`: as in `Attention.__call__`, of all heads.
        """
        own_beside = None if beside is None else self._own_heads(beside)
        if self.ring.size > 1:
            stacked = keys_values if isinstance(keys_values, Tensor) else torch.stack(keys_values)
            return self._ring_attention(q, stacked, chunks, own_beside)
        # A rank without heads (more Ulysses ranks than heads) has nothing to compute, and kernels crash on empty input.
        if not q.numel():
            return torch.empty_like(q)
        keys, values = _with(keys_values, own_beside)
        return self.kernel.attend(q, keys, values)

    def gather(self, attended: Tensor, q: Sent) -> Tensor:
        """The inverse of `send`, for what `q` attended to, `[B, h, S_chunk, D]`: this rank's tokens of all heads."""
        if self.ulysses.size == 1:
            return attended.transpose(1, 2)
        batch, own_heads, _, dim = attended.shape
        head_counts = split_sizes(q.heads, self.ulysses.size)
        lengths = self._chunk_lengths(q.tokens)
        own_length = lengths[self.ulysses.rank]
        row = batch * dim
        exchange = self.ulysses.start_all_to_all(
            attended.permute(2, 1, 0, 3).reshape(-1),
            [extent * own_heads * row for extent in lengths],
            [own_length * count * row for count in head_counts],
        )
        parts = exchange.wait().split([own_length * count * row for count in head_counts])
        return torch.cat(
            [
                part.view(own_length, count, batch, dim).permute(2, 0, 1, 3)
                for part, count in zip(parts, head_counts, strict=True)
            ],
            dim=2,
        )

    def _chunk_lengths(self, tokens: Tokens) -> list[int]:
        """The lengths held by the ranks of this Ulysses axis."""
        start = self.ring.rank * self.ulysses.size
        return self._lengths[tokens][start : start + self.ulysses.size]

    def _own_heads(self, whole: KeysValues) -> tuple[Tensor, Tensor]:
        """From tokens of all heads `[B, S, H, D]` to this rank's heads of them, `[B, h, S, D]`."""
        counts = split_sizes(whole[0].shape[2], self.ulysses.size)
        start = sum(counts[: self.ulysses.rank])
        keys, values = (each.narrow(2, start, counts[self.ulysses.rank]).transpose(1, 2) for each in whole)
        return keys, values

    def _ring_attention(
        self, q: Tensor, keys_values: Tensor, chunks: Sequence[int], beside: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Queries `[B, h, S, D]` over the keys and values `[2, B, h, S_chunk, D]` of every ring rank, and `beside`.

        Partial results merge by log-sum-exp in fp32, while the next block is on its way.
        """
        two, batch, heads, _, dim = keys_values.shape
        out = lse = None
        block = keys_values
        for hop in range(self.ring.size):
            shift = None
            if hop + 1 < self.ring.size:
                source = (self.ring.rank - hop - 1) % self.ring.size
                received = keys_values.new_empty((two, batch, heads, chunks[source], dim))
                shift = self.ring.start_shift(block, received)
            # What is beside them is not passed on: every rank adds it to its own block.
            keys, values = _with(block, None if hop else beside)
            if q.numel() and keys.numel():
                partial, partial_lse = self.kernel.attend_with_lse(q, keys, values)
                out, lse = _merge(out, lse, partial, partial_lse)
            if shift is not None:
                block = shift.wait()
        return torch.empty_like(q) if out is None else out.to(q.dtype)


def _with(keys_values: Tensor | tuple[Tensor, Tensor], more: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, h, S, D]`, followed by `more` of them."""
    if more is None:
        return keys_values[0], keys_values[1]
    return torch.cat((keys_values[0], more[0]), dim=2), torch.cat((keys_values[1], more[1]), dim=2)


def _merge(out: Tensor | None, lse: Tensor | None, partial: Tensor, partial_lse: Tensor) -> tuple[Tensor, Tensor]:
    if out is None or lse is None:
        return partial.float(), partial_lse.float()
    difference = partial_lse - lse
    out.lerp_(partial.float(), torch.sigmoid(difference).unsqueeze(-1))
    return out, lse - F.logsigmoid(-difference)
