"""Attention over sequence-parallel ranks: local, Ulysses, ring and their hybrid (USP), with uneven tokens and heads.

Sources: Ulysses (arXiv 2309.14509), ring attention (arXiv 2310.01889), their hybrid USP (arXiv 2405.07719).
Every rank holds some tokens of all heads. An all-to-all within the Ulysses axis trades them for some heads of the
chunk of tokens that the axis holds together; keys and values of the other chunks then pass by on the ring axis.
Attention does not depend on the order of the keys, so each rank's tokens may be any mixture of text and image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..comm import Axis, split_sizes
from ..layout import AttentionKernel
from .kernels import Kernel, select_kernel
from .yunchang import YunchangAttention


class Attention(Protocol):
    """What every attention site of a model calls."""

    def set_lengths(self, lengths: Sequence[int]) -> None: ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def make_attention(
    name: AttentionKernel, ulysses: Axis, ring: Axis, device: torch.device, dtype: torch.dtype
) -> Attention:
    """Attention over the ranks of both axes by the kernel `name`. Raises `UserError` when it cannot run here."""
    if name == "yunchang":
        return YunchangAttention(ulysses, ring, device, dtype)
    return AttentionCore(ulysses, ring, select_kernel(name, device, dtype))


class AttentionCore:
    """Called by every attention site of a model with this rank's tokens of all heads, `[B, S, H, D]`."""

    def __init__(self, ulysses: Axis, ring: Axis, kernel: Kernel) -> None:
        self.ulysses = ulysses
        self.ring = ring
        self.kernel = kernel
        self._lengths: list[int] = []

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Say how many tokens each sequence-parallel rank holds, in the order ring-major, Ulysses-minor."""
        if len(lengths) != self.ulysses.size * self.ring.size:
            raise ValueError(f"{len(lengths)} lengths for {self.ulysses.size * self.ring.size} sequence-parallel ranks")
        self._lengths = list(lengths)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of this rank's queries over all ranks' keys and values; all `[B, S, H, D]`."""
        query, keys_values = self.scatter(q, k, v)
        size = self.ulysses.size
        chunks = [sum(self._lengths[index * size : (index + 1) * size]) for index in range(self.ring.size)]
        return self.gather(self.attend(query, keys_values, chunks), q.shape[2])

    def scatter(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """The query `[B, h, S_chunk, D]`, the key and the value of this rank's heads for the tokens of the chunk."""
        if self.ulysses.size == 1:
            return q.transpose(1, 2), (k.transpose(1, 2), v.transpose(1, 2))
        qkv = self._scatter_heads(q, k, v)
        return qkv[0], qkv[1:]

    def attend(self, q: Tensor, keys_values: Tensor | tuple[Tensor, Tensor], chunks: Sequence[int]) -> Tensor:
        """Queries over this chunk's keys and values, and over those of the ring's other chunks, `chunks` long each."""
        if self.ring.size > 1:
            stacked = keys_values if isinstance(keys_values, Tensor) else torch.stack(keys_values)
            return self._ring_attention(q, stacked, chunks)
        # A rank without heads (more Ulysses ranks than heads) has nothing to compute, and kernels crash on empty input.
        return self.kernel.attend(q, keys_values[0], keys_values[1]) if q.numel() else torch.empty_like(q)

    def gather(self, attended: Tensor, heads: int) -> Tensor:
        """The inverse of `scatter` for what was attended: this rank's tokens of all heads, `[B, S, H, D]`."""
        return attended.transpose(1, 2) if self.ulysses.size == 1 else self._gather_heads(attended, heads)

    def _chunk_lengths(self) -> list[int]:
        """The lengths held by the ranks of this Ulysses axis."""
        start = self.ring.rank * self.ulysses.size
        return self._lengths[start : start + self.ulysses.size]

    def _scatter_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """This rank's tokens of all heads, `[B, S, H, D]` each -> all tokens of its heads, `[3, B, h, S_chunk, D]`."""
        batch, length, heads, dim = q.shape
        head_counts = split_sizes(heads, self.ulysses.size)
        own_heads = head_counts[self.ulysses.rank]
        lengths = self._chunk_lengths()
        by_head = torch.stack([part.permute(2, 0, 1, 3) for part in (q, k, v)], dim=1)
        row = 3 * batch * dim
        received = self.ulysses.all_to_all(
            by_head.view(heads * length, row),
            [count * length for count in head_counts],
            [own_heads * extent for extent in lengths],
        )
        parts = received.split([own_heads * extent for extent in lengths])
        return torch.cat(
            [
                part.view(own_heads, 3, batch, extent, dim).permute(1, 2, 0, 3, 4)
                for part, extent in zip(parts, lengths, strict=True)
            ],
            dim=3,
        )

    def _gather_heads(self, attended: Tensor, heads: int) -> Tensor:
        """`[B, h, S_chunk, D]` with this rank's heads -> `[B, S, H, D]` with its own tokens and all heads."""
        batch, own_heads, chunk, dim = attended.shape
        head_counts = split_sizes(heads, self.ulysses.size)
        lengths = self._chunk_lengths()
        own_length = lengths[self.ulysses.rank]
        by_token = attended.permute(2, 0, 1, 3).contiguous()
        received = self.ulysses.all_to_all(
            by_token.view(chunk * own_heads, batch * dim),
            [extent * own_heads for extent in lengths],
            [own_length * count for count in head_counts],
        )
        parts = received.split([own_length * count for count in head_counts])
        return torch.cat(
            [
                part.view(own_length, batch, count, dim).transpose(0, 1)
                for part, count in zip(parts, head_counts, strict=True)
            ],
            dim=2,
        )

    def _ring_attention(self, q: Tensor, keys_values: Tensor, chunks: Sequence[int]) -> Tensor:
        """Queries `[B, h, S, D]` over the keys and values `[2, B, h, S_chunk, D]` of every ring rank.

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
            if q.numel() and block.numel():
                partial, partial_lse = self.kernel.attend_with_lse(q, block[0], block[1])
                out, lse = _merge(out, lse, partial, partial_lse)
            if shift is not None:
                block = shift.wait()
        return torch.empty_like(q) if out is None else out.to(q.dtype)


def _merge(out: Tensor | None, lse: Tensor | None, partial: Tensor, partial_lse: Tensor) -> tuple[Tensor, Tensor]:
    if out is None or lse is None:
        return partial.float(), partial_lse.float()
    difference = partial_lse - lse
    out.lerp_(partial.float(), torch.sigmoid(difference).unsqueeze(-1))
    return out, lse - F.logsigmoid(-difference)
