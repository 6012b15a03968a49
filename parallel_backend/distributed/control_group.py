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


class ControlGroup:
    """Collectives on a group of its own. Every rank makes the same calls in the same order."""

    def __init__(self) -> None:
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def abandon(self) -> None:
        """Give up the group, as `abandon_groups` does: ranks that wait in it for this one raise."""
        groups = [self._group]
        del self._group
        abandon_groups(groups)

    def start_meeting(self) -> dist.Work:
        """Begin to wait until every rank has come here."""
        return cast(dist.Work, dist.barrier(group=self._group, async_op=True))

    def share(self, *parts: bytearray) -> list[bytearray]:
        """Rank 0's bytes on every rank. The others give as many parts, whatever is in them."""
        sizes = torch.tensor([len(part) for part in parts])
        self._broadcast(sizes)
        return [self._share_bytes(part, size) for part, size in zip(parts, sizes.tolist(), strict=True)]

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

    def gather(self, value: object) -> list[object]:
        """Every rank's JSON value, on every rank, in the order of ranks."""
        mine = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(mine)]), group=self._group)
        longest = int(max(sizes))
        padded = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(padded, _as_bytes(bytearray(mine.ljust(longest))), group=self._group)
        return [json.loads(text.numpy()[: int(size)].tobytes()) for text, size in zip(padded, sizes, strict=True)]

    def _share_bytes(self, data: bytearray, size: int) -> bytearray:
        data = data if self.rank == 0 else bytearray(size)
        if size:
            self._broadcast(_as_bytes(data))
        return data

    def _broadcast(self, tensor: torch.Tensor) -> None:
        dist.broadcast(tensor, src=0, group=self._group)


def _as_bytes(data: bytearray) -> torch.Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)
