"""The ranks' agreement: the same request and the same cancel point for all, over CPU groups of long patience."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from .groups import abandon_groups

PATIENCE = timedelta(days=365)
"""How long a rank waits for the next request. A waiting rank uses no CPU."""
LEAST_ROOM, MOST_ROOM = 4 << 10, 4 << 20
"""Bytes of the first broadcast of `share`."""
SHORT = 256
"""Bytes of a value that `gather` takes in one collective."""
SIZE = torch.int64.itemsize


class Gathering:
    """A gather under way. `wait` is a collective where one of the values is long."""

    def __init__(self, group: dist.ProcessGroup, size: int, value: object) -> None:
        self._group = group
        self._mine = json.dumps(value).encode()
        head = _bytes_of([len(self._mine)], self._mine[:SHORT], SIZE + SHORT)
        self._heads = [torch.empty_like(head) for _ in range(size)]
        self._work = cast(dist.Work, dist.all_gather(self._heads, head, group=group, async_op=True))

    def is_completed(self) -> bool:
        """Whether every rank has come here."""
        return self._work.is_completed()

    def wait(self) -> list[object]:
        """Every rank's value, in the order of ranks."""
        self._work.wait()
        sizes = [int(head[:SIZE].view(torch.int64)) for head in self._heads]
        texts = [head[SIZE:] for head in self._heads]
        if max(sizes) > SHORT:
            texts = [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes]
            dist.all_gather(texts, _bytes_of([], self._mine, max(sizes)), group=self._group)
        return [json.loads(text.numpy()[:size].tobytes()) for text, size in zip(texts, sizes, strict=True)]


class ControlGroup:
    """Collectives on a group of its own. Every rank makes the same calls in the same order."""

    def __init__(self) -> None:
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
        self._room = LEAST_ROOM
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def abandon(self) -> None:
        """Give up the group, as `abandon_groups` does: ranks that wait in it for this one raise."""
        groups = [self._group]
        del self._group
        abandon_groups(groups)

    def share(self, *parts: bytearray) -> list[bytearray]:
        """Rank 0's bytes on every rank. The others give as many parts, whatever is in them.

        One broadcast for what is no larger than the last time, as for the steps of a sampler; else one more a part.
        """
        start = SIZE * len(parts)
        head = torch.empty(self._room, dtype=torch.uint8)
        if self.rank == 0:
            is_whole = start + sum(map(len, parts)) <= self._room
            head = _bytes_of([len(part) for part in parts], b"".join(parts) if is_whole else b"", self._room)
        self._broadcast(head)
        sizes = head[:start].view(torch.int64).tolist()
        is_whole = start + sum(sizes) <= self._room
        self._room = min(max(LEAST_ROOM, 1 << (start + sum(sizes) - 1).bit_length()), MOST_ROOM)
        if self.rank == 0 and is_whole:
            return list(parts)
        if not is_whole:
            return [self._share_bytes(part, size) for part, size in zip(parts, sizes, strict=True)]
        return [bytearray(part.numpy().tobytes()) for part in head[start : start + sum(sizes)].split(sizes)]

    def agree(self, flag: bool) -> bool:
        """Rank 0's flag on every rank."""
        decision = torch.tensor([flag], dtype=torch.uint8)
        self._broadcast(decision)
        return bool(decision)

    def start_largest(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        """Begin to find the largest of every rank's numbers, place by place; the call that it returns waits for them.

        No rank waits for another before that.
        """
        largest = torch.tensor(numbers)
        work = cast(dist.Work, dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group, async_op=True))

        def wait() -> list[int]:
            work.wait()
            return largest.tolist()

        return wait

    def start_gather(self, value: object) -> Gathering:
        """Begin to give every rank's JSON value to every rank. No rank waits for another before it asks for them."""
        return Gathering(self._group, self.size, value)

    def gather(self, value: object) -> list[object]:
        """Every rank's JSON value, on every rank, in the order of ranks."""
        return self.start_gather(value).wait()

    def _share_bytes(self, data: bytearray, size: int) -> bytearray:
        data = data if self.rank == 0 else bytearray(size)
        if size:
            self._broadcast(_as_bytes(data))
        return data

    def _broadcast(self, tensor: torch.Tensor) -> None:
        dist.broadcast(tensor, src=0, group=self._group)


def _as_bytes(data: bytearray) -> torch.Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)


def _bytes_of(sizes: Sequence[int], data: bytes, room: int) -> torch.Tensor:
    """`sizes`, then `data`, padded to `room` bytes."""
    head = torch.tensor(sizes, dtype=torch.int64).numpy().tobytes()
    return _as_bytes(bytearray(head + data).ljust(room, b"\0"))
