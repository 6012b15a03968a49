"""Attention over sequence-parallel ranks: local, Ulysses, ring and their hybrid (USP), with uneven tokens and heads.

Sources: Ulysses (arXiv 2309.14509), ring attention (arXiv 2310.01889), their hybrid USP (arXiv 2405.07719).
Every rank holds some tokens of all heads. An all-to-all within the Ulysses axis trades them for some heads of the
chunk of tokens that the axis holds together; keys and values of the other chunks then pass by on the ring axis.
Attention does not depend on the order of the keys, so each rank's tokens may be any mixture of streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..distributed.axis import Axis
from ..layout.layout import AttentionKernel
from ..layout.split import split_sizes
from .halo import edges_of, gathered, with_halo
from .kernels import Kernel, preferred_kernel, select_kernel
from .site import Attention, KeySet, KeysValues, Sent, SiteId, Streams, Sum
from .yunchang import YunchangAttention


def make_attention(
    name: AttentionKernel,
    ulysses: Axis,
    ring: Axis,
    device: torch.device,
    dtype: torch.dtype,
    *,
    preferred: AttentionKernel = "auto",
) -> Attention:
    """Attention over the ranks of both axes by the kernel `name`. Raises `UserError` when it cannot run here.

    `preferred`: what "auto" is, where that kernel can run here.
    """
    if name == "yunchang":
        return YunchangAttention(ulysses, ring, device, dtype)
    if name == "auto" and preferred != "auto":
        return AttentionCore(ulysses, ring, preferred_kernel(preferred, device, dtype, ring.size > 1))
    return AttentionCore(ulysses, ring, select_kernel(name, device, dtype, with_lse=ring.size > 1))


@dataclass(frozen=True)
class OwnKeys:
    """A `KeySet` at this rank: its chunk's keys and values, stacked `[2, B, h, S_chunk, D]` or one after the other.

    `chunks`: how long the chunk of each rank of the ring is. `serves`: as in `Sent`, of this rank's heads.
    """

    keys_values: Tensor | tuple[Tensor, Tensor]
    chunks: Sequence[int]
    serves: Sequence[int] | None = None
    log_weight: float = 0.0
    places: int | None = None


class AttentionCore:
    """Called by every attention site of a model with this rank's tokens of all heads, `[B, S, H, D]`."""

    keeps = False

    def __init__(self, ulysses: Axis, ring: Axis, kernel: Kernel) -> None:
        self.ulysses = ulysses
        self.ring = ring
        self.kernel = kernel
        self._lengths: Mapping[str, Sequence[int]] = {}

    def set_lengths(self, lengths: Mapping[str, Sequence[int]]) -> None:
        ranks = self.ulysses.size * self.ring.size
        if any(len(each) != ranks for each in lengths.values()):
            raise ValueError(f"{ {name: len(each) for name, each in lengths.items()} } lengths for {ranks} ranks")
        self._lengths = lengths

    def __call__(self, site: SiteId, q: Sent, *sets: KeySet, extra_kv: KeysValues | None = None) -> Tensor:
        own = []
        for each in sets:
            # The values were sent first and are here first.
            values = each.value.wait()
            keys_values = (each.key.wait(), values)
            own.append(self.own_keys(each, keys_values, self.chunks(each.key.streams)))
        return self.gather(self.attend(q.wait(), own, extra_kv), q)

    def send(self, x: Tensor, streams: Streams, serves: Sequence[int] | None = None) -> Sent:
        """Start to trade this rank's tokens of all heads, `[B, S, H, D]`, for all tokens of some heads."""
        if self.ulysses.size == 1:
            return Sent(x, streams, serves=serves)
        batch, length, _, dim = x.shape
        shares = self._head_shares(x.shape[2], serves)
        own = shares[self.ulysses.rank]
        lengths = self._chunk_lengths(streams)
        # Tokens first: what comes from the ranks of the axis is then one tensor of all their tokens, without a copy.
        row = batch * dim
        sizes = [length * len(share) * row for share in shares]
        packed = [
            x[:, :, heads.start : heads.stop].unflatten(2, (ranks, -1)).permute(2, 1, 3, 0, 4).reshape(-1)
            for ranks, heads in _runs(shares)
        ]
        outgoing = packed[0] if len(packed) == 1 else torch.cat(packed)
        exchange = self.ulysses.start_all_to_all(outgoing, sizes, [extent * len(own) * row for extent in lengths])
        own_serves = None if serves is None else self._own_serves(serves, own)
        return Sent(x, streams, exchange, sum(lengths), len(own), own_serves)

    def own_keys(self, keys: KeySet, keys_values: Tensor | tuple[Tensor, Tensor], chunks: Sequence[int]) -> OwnKeys:
        """A set whose keys and values this rank holds, for its heads."""
        return OwnKeys(keys_values, chunks, keys.key.serves, keys.log_weight, keys.places)

    def chunks(self, streams: Streams) -> list[int]:
        """How many tokens of `streams` the chunk of each rank of the ring has."""
        lengths, size = self._sums(streams), self.ulysses.size
        return [sum(lengths[index * size : (index + 1) * size]) for index in range(self.ring.size)]

    def attend(self, q: Tensor, sets: Sequence[OwnKeys], extra_kv: KeysValues | None = None) -> Tensor:
        """Queries `[B, h, S, D]` over the keys of `sets`, of this rank's chunk and of the ring's other chunks.

        `extra_kv`: as in `Attention.__call__`, of all heads.
        """
        extra = None if extra_kv is None else self._own_heads(extra_kv)
        plain = all(not each.log_weight and each.places is None for each in sets)
        if self.ring.size == 1 and plain:
            # A rank without heads (more Ulysses ranks than heads) has nothing to compute, and kernels crash on that.
            if not q.numel():
                return torch.empty_like(q)
            return self.kernel.attend(q, *_joined([_for_queries(each) for each in sets], extra))
        out = lse = None
        for number, each in enumerate(sets):
            out, lse = self._over_chunks(q, each, None if number else extra, out, lse)
        return torch.empty_like(q) if out is None else out.to(q.dtype)

    def local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.numel():
            return torch.empty_like(q)
        return self.kernel.attend(*(each.transpose(1, 2) for each in (q, k, v))).transpose(1, 2)

    def total(self, site: SiteId, stream: str, of: Sum) -> Tensor:
        return self.reduce(of(slice(None)).contiguous())

    def halo(self, site: SiteId, stream: str, x: Tensor, row: int) -> list[Tensor]:
        edges = gathered(edges_of([x], row), (self.ulysses, self.ring))[:, 0]
        rank = self.ring.rank * self.ulysses.size + self.ulysses.rank
        return [with_halo(x, rank, edges, self._lengths[stream])]

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of contiguous `x` over all ranks, in its place."""
        return self.ring.all_reduce(self.ulysses.all_reduce(x))

    def gather(self, attended: Tensor, q: Sent) -> Tensor:
        """The inverse of `send`, for what `q` attended to, `[B, h, S_chunk, D]`: this rank's tokens of all heads."""
        if self.ulysses.size == 1:
            return attended.transpose(1, 2)
        batch, own_heads, _, dim = attended.shape
        head_counts = split_sizes(q.heads, self.ulysses.size)
        lengths = self._chunk_lengths(q.streams)
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

    def _sums(self, streams: Streams) -> list[int]:
        """How many tokens of `streams` each rank holds."""
        return [sum(each) for each in zip(*(self._lengths[name] for name in streams), strict=True)]

    def _chunk_lengths(self, streams: Streams) -> list[int]:
        """How many tokens of `streams` the ranks of this Ulysses axis hold."""
        start = self.ring.rank * self.ulysses.size
        return self._sums(streams)[start : start + self.ulysses.size]

    def _head_shares(self, heads: int, serves: Sequence[int] | None) -> list[range]:
        """The heads that each rank of the Ulysses axis gets: its query heads, or those that serve them."""
        edges = list(accumulate(split_sizes(heads if serves is None else len(serves), self.ulysses.size), initial=0))
        if serves is None:
            return [range(start, stop) for start, stop in pairwise(edges)]
        return [
            range(serves[start], serves[stop - 1] + 1) if start < stop else range(0) for start, stop in pairwise(edges)
        ]

    def _own_serves(self, serves: Sequence[int], own: range) -> list[int]:
        """Returns, for each query head of this rank, which of its own key and value heads serves it."""
        sizes = split_sizes(len(serves), self.ulysses.size)
        first = sum(sizes[: self.ulysses.rank])
        return [head - own.start for head in serves[first : first + sizes[self.ulysses.rank]]]

    def _own_heads(self, whole: KeysValues) -> tuple[Tensor, Tensor]:
        """Cuts this rank's heads `[B, h, S, D]` out of tokens of all heads `[B, S, H, D]`."""
        counts = split_sizes(whole[0].shape[2], self.ulysses.size)
        start = sum(counts[: self.ulysses.rank])
        keys, values = (each.narrow(2, start, counts[self.ulysses.rank]).transpose(1, 2) for each in whole)
        return keys, values

    def _over_chunks(
        self,
        q: Tensor,
        keys: OwnKeys,
        extra: tuple[Tensor, Tensor] | None,
        out: Tensor | None,
        lse: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """`out` and its `lse` (fp32) with what queries find in the chunks of every ring rank, and in `extra`, merged.

        Partial results merge by log-sum-exp in fp32, while the next chunk is on its way.
        """
        block = keys.keys_values
        if self.ring.size > 1:
            block = block if isinstance(block, Tensor) else torch.stack(block)
        for hop in range(self.ring.size):
            shift = None
            if hop + 1 < self.ring.size:
                assert isinstance(block, Tensor)
                source = (self.ring.rank - hop - 1) % self.ring.size
                received = block.new_empty((*block.shape[:3], keys.chunks[source], block.shape[4]))
                shift = self.ring.start_shift(block, received)
            own = _for_queries(keys, block)
            # What every rank has is not passed on: each adds it to its own chunk.
            if extra is not None and hop == 0 and keys.places is None and not keys.log_weight:
                own, extra = _joined([own], extra), None
            out, lse = self._with_partial(q, own, keys, out, lse)
            if shift is not None:
                block = shift.wait()
        if extra is not None:
            out, lse = self._with_partial(q, extra, OwnKeys(extra, ()), out, lse)
        return out, lse

    def _with_partial(
        self, q: Tensor, own: tuple[Tensor, Tensor], keys: OwnKeys, out: Tensor | None, lse: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if not q.numel() or not own[0].numel():
            return out, lse
        if keys.places is None:
            partial, partial_lse = self.kernel.attend_with_lse(q, *own)
        else:
            by_place = [_by_place(each, keys.places) for each in (q, *own)]
            partial, partial_lse = self.kernel.attend_with_lse(*by_place)
            partial = _in_frames(partial, keys.places)
            partial_lse = _in_frames(partial_lse.unsqueeze(-1), keys.places).squeeze(-1)
        return _merge(out, lse, partial, partial_lse + keys.log_weight if keys.log_weight else partial_lse)


def _runs(shares: Sequence[range]) -> list[tuple[int, range]]:
    """Ranks that follow each other with equally many heads, those of one behind those of the one before: how many ranks
    they are, and all of their heads. Each such run is packed at once. Ranks without heads are left out."""
    runs: list[tuple[int, range]] = []
    for share in filter(None, shares):
        ranks, heads = runs[-1] if runs else (0, range(0))
        if ranks and heads.stop == share.start and len(heads) == ranks * len(share):
            runs[-1] = ranks + 1, range(heads.start, share.stop)
        else:
            runs.append((1, share))
    return runs


def _for_queries(keys: OwnKeys, block: Tensor | tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, h, S, D]` with a head for each query head."""
    key, value = keys.keys_values if block is None else block
    if keys.serves is None or list(keys.serves) == list(range(key.shape[1])):
        return key, value
    serves = torch.tensor(keys.serves, device=key.device)
    return key.index_select(1, serves), value.index_select(1, serves)


def _joined(sets: Sequence[tuple[Tensor, Tensor]], extra: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """All of their keys and values `[B, h, S, D]`, one after the other."""
    parts = [*sets, extra] if extra is not None else sets
    if len(parts) == 1:
        return parts[0]
    keys, values = (torch.cat(each, dim=2) for each in zip(*parts, strict=True))
    return keys, values


def _by_place(x: Tensor, places: int) -> Tensor:
    """Regroups frames of `places`, `[B, h, F * P, D]`, into the frames of each place, `[B * P, h, F, D]`."""
    return x.unflatten(2, (-1, places)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def _in_frames(x: Tensor, places: int) -> Tensor:
    """The inverse of `_by_place`."""
    return x.unflatten(0, (-1, places)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _merge(out: Tensor | None, lse: Tensor | None, partial: Tensor, partial_lse: Tensor) -> tuple[Tensor, Tensor]:
    if out is None or lse is None:
        return partial.float(), partial_lse.float()
    out.lerp_(partial.float(), torch.sigmoid(partial_lse - lse).unsqueeze(-1))
    return out, torch.logaddexp(lse, partial_lse)
