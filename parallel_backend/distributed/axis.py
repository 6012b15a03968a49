"""The one layer through which ranks talk while they compute: axes, their collectives, the ledger of what was sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .ledger import Ledger

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""Newer releases of torch call it by the first name."""


Called = TypeVar("Called", bound=Callable[..., Any])

_NOT_COMPILED: set[Callable[..., Any]] = set()


def not_compiled(function: Called) -> Called:
    """Mark `function` as one to keep out of compiled blocks, see `keep_talk_out_of_compiled_blocks`."""
    _NOT_COMPILED.add(function)
    return function


@cache
def keep_talk_out_of_compiled_blocks() -> None:
    """Must be called before the first block is compiled: what the ledger counts would make every call compile anew.

    Not done where the functions are defined: torch's compiler takes seconds to import, and most ranks never use it.
    """
    for owner in (Exchange, Axis):
        for name, function in tuple(vars(owner).items()):
            if callable(function) and function in _NOT_COMPILED:
                setattr(owner, name, torch.compiler.disable(function))


class Exchange:
    """A ring hop or a collective under way: `wait` returns what was received. It may be called again, as `Hop.wait`."""

    def __init__(self, received: Tensor, sent: Tensor, works: Sequence[dist.Work | None]) -> None:
        self._received = received
        self._sent = sent  # kept alive until it is over
        self._works = works

    @not_compiled
    def wait(self) -> Tensor:
        works, self._works = self._works, ()
        for work in filter(None, works):
            work.wait()
        return self._received


class Hop:
    """A message to or from one other rank, under way: `wait` returns the tensor when the hop is over.

    It may be called again: work of gloo must not be waited for twice.
    """

    def __init__(self, x: Tensor, work: dist.Work | None) -> None:
        self._x = x  # kept alive until the hop is over
        self._work = work

    def wait(self) -> Tensor:
        work, self._work = self._work, None
        if work is not None:
            work.wait()
        return self._x


class Axis:
    """One mesh axis as this rank sees it: its ranks, this rank's place among them, and the collectives over it."""

    def __init__(self, name: str, ranks: Sequence[int], group: dist.ProcessGroup | None, ledger: Ledger) -> None:
        self.name = name
        self.ranks = tuple(ranks)
        self.group = group
        self.ledger = ledger
        self.size = len(self.ranks)
        self.rank = self.ranks.index(dist.get_rank()) if self.size > 1 else 0

    def release(self) -> list[dist.ProcessGroup]:
        """The group, if there is one, for `leave_groups`. The axis cannot be used any more."""
        group = self.group
        del self.group
        return [] if group is None else [group]

    @not_compiled
    def start_all_to_all(self, x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Exchange:
        """Send `x.split(send_sizes)[j]` to rank j, and receive what all ranks send here, concatenated in their order.

        `x` is contiguous and flat; sizes are numbers of elements, may differ from rank to rank and be 0.
        """
        received = x.new_empty(sum(receive_sizes))
        work = dist.all_to_all_single(
            received, x, list(receive_sizes), list(send_sizes), group=self.group, async_op=True
        )
        self._record("all_to_all", (x.numel() - send_sizes[self.rank]) * x.element_size(), self.size - 1)
        return Exchange(received, x, [work])

    @not_compiled
    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """Concatenate every rank's `x` along `dim`; `sizes[j]` is the extent of rank j's part."""
        if self.size == 1:
            return x
        widest = max(sizes)
        first = x.movedim(dim, 0)
        padded = first.new_zeros((widest, *first.shape[1:]))
        padded[: sizes[self.rank]] = first
        gathered = padded.new_empty((self.size, *padded.shape))
        _all_gather(gathered.flatten(0, 1), padded, group=self.group)
        self._record("all_gather", padded.numel() * padded.element_size() * (self.size - 1), self.size - 1)
        return torch.cat([part[:extent] for part, extent in zip(gathered, sizes, strict=True)]).movedim(0, dim)

    @not_compiled
    def start_all_gather(self, x: Tensor, gathered: Tensor) -> Exchange:
        """Put every rank's contiguous `x`, all of one size, one after the other into contiguous `gathered`."""
        if self.size == 1:
            return Exchange(gathered.copy_(x, non_blocking=True), x, [])
        work = _all_gather(gathered, x, group=self.group, async_op=True)
        self._record("all_gather", x.numel() * x.element_size() * (self.size - 1), self.size - 1)
        return Exchange(gathered, x, [work])

    @not_compiled
    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's contiguous `x`, in its place, bit for bit the same on every rank.

        Counted as the ring algorithm sends it: every rank passes on N - 1 of N pieces to add up, and N - 1 sums.
        """
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
            hops = 2 * (self.size - 1)
            self._record("all_reduce", hops * x.numel() * x.element_size() // self.size, hops)
        return x

    @not_compiled
    def start_shift(self, x: Tensor, received: Tensor) -> Exchange:
        """Send contiguous `x` to the next rank of the ring and receive the previous rank's into `received`."""
        following = self.ranks[(self.rank + 1) % self.size]
        previous = self.ranks[(self.rank - 1) % self.size]
        # The receive goes first: a gloo send is a rendezvous that completes only once the peer has posted its receive.
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.irecv, received, previous, group=self.group),
                dist.P2POp(dist.isend, x, following, group=self.group),
            ]
        )
        self._record("shift", x.numel() * x.element_size(), 1)
        return Exchange(received, x, works)

    def start_send(self, x: Tensor, to: int) -> Hop:
        """Send contiguous `x` to the rank of index `to`, which has posted, or will post, its receive."""
        work = dist.isend(x, self.ranks[to], group=self.group)
        self._record("send", x.numel() * x.element_size(), 1)
        return Hop(x, work)

    def start_receive(self, x: Tensor, source: int) -> Hop:
        """Receive into contiguous `x` what the rank of index `source` sends."""
        return Hop(x, dist.irecv(x, self.ranks[source], group=self.group))

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """`x` of the rank of index `source`, written into every rank's contiguous `x`."""
        if self.size > 1:
            dist.broadcast(x, self.ranks[source], group=self.group)
            if self.rank == source:
                self._record("broadcast", x.numel() * x.element_size() * (self.size - 1), self.size - 1)
        return x

    @not_compiled
    def start_broadcast(self, x: Tensor, source: int) -> Exchange:
        """Write `x` of the rank of index `source` into every rank's contiguous `x`."""
        work = dist.broadcast(x, self.ranks[source], group=self.group, async_op=True)
        if self.rank == source:
            self._record("broadcast", x.numel() * x.element_size() * (self.size - 1), self.size - 1)
        return Exchange(x, x, [work])

    def _record(self, operation: str, bytes: int, messages: int) -> None:
        self.ledger.record(self.name, operation, bytes, messages)
