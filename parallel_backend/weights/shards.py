"""A rank's share of the bytes of every block, and the buffers in which blocks are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from ..layout.model_part import Share
from .reader import Reader, StoredTensor

ALIGNMENT = 64
"""Where a parameter may begin, in bytes: no element crosses from one share to the next, and kernels can vectorize."""


@dataclass(frozen=True)
class BlockShards:
    """`shares[i]`: this rank's bytes of block i, one of as many equal shares as there are ranks.

    The parameters of block i are views of `buffers[i % len(buffers)]`, which holds its bytes only when it computes.
    """

    shares: tuple[Tensor, ...]
    buffers: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.shares, *self.buffers))


def load_shards(
    blocks: Sequence[Sequence[StoredTensor]], module: nn.Module, reader: Reader, share: Share, *, in_host_memory: bool
) -> BlockShards:
    """Reads this rank's share of each of `blocks`, and gives `module` parameters whose values come later."""
    offsets = [_offsets(entries) for entries in blocks]
    sizes = [_rounded_up(starts[-1], share.count * ALIGNMENT) for starts in offsets]
    buffers = tuple(torch.empty(max(sizes), dtype=torch.uint8, device=reader.device) for _ in blocks[:2])
    lengths = [size // share.count for size in sizes]
    pinned = in_host_memory and reader.device.type == "cuda"
    device = torch.device("cpu") if in_host_memory else reader.device
    # Pinned memory comes in powers of two.
    pieces = pieces_of(lengths) if pinned else [(length, [length]) for length in lengths]
    shares = [
        own
        for size, parts in pieces
        for own in torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned)[: sum(parts)].split(parts)
    ]
    for number, (entries, starts, own) in enumerate(zip(blocks, offsets, shares, strict=True)):
        length = lengths[number]
        begin, end = share.index * length, (share.index + 1) * length
        for entry, start in zip(entries, starts, strict=False):
            first, last = max(begin, start), min(end, start + entry.bytes)
            if first < last:
                width = entry.format.dtype.itemsize
                flat = reader.read_flat(entry, (first - start) // width, (last - start) // width)
                own[first - begin : last - begin] = flat.view(torch.uint8)
            place = buffers[number % len(buffers)][start : start + entry.bytes]
            entry.assign(module, place.view(entry.format.dtype).view(entry.format.stored_shape(entry.shape)))
    return BlockShards(tuple(shares), buffers)


def pieces_of(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Pieces of memory for parts of these `lengths`, in order: a power of two, and the parts that it is for.

    As large as what is left of the parts fills, so that little of the pieces stays empty.
    """
    pieces: list[tuple[int, list[int]]] = []
    left = list(lengths)
    while left:
        size = max(1 << sum(left).bit_length() - 1, 1 << max(left[0] - 1, 0).bit_length())
        ends = [end for end in accumulate(left) if end <= size]
        pieces.append((size, left[: len(ends)]))
        left = left[len(ends) :]
    return pieces


def _offsets(entries: Sequence[StoredTensor]) -> list[int]:
    """Where each parameter of a block begins, and where the last one ends."""
    return list(accumulate((_rounded_up(entry.bytes, ALIGNMENT) for entry in entries), initial=0))


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
