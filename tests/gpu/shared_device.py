"""Ranks that share one GPU: the communication layer's messages go through host memory, over gloo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from paralleldit.parallel_backend.distributed import axis
from torch import Tensor

Group = dist.ProcessGroup | None


class StagedWork:
    """Work under way between host buffers; `wait` puts what has arrived in them where it belongs."""

    def __init__(self, work: dist.Work | None, arriving: Tensor | None = None, host: Tensor | None = None) -> None:
        self._work, self._arriving, self._host = work, arriving, host

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
        if self._arriving is not None and self._host is not None:
            self._arriving.copy_(self._host)
        self._arriving = None


class StagedDistributed:
    """In the place of `torch.distributed`. As NCCL, it takes contiguous tensors only."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def isend(self, x: Tensor, to: int, group: Group = None) -> StagedWork:
        return StagedWork(dist.isend(_sent(x), to, group=group))

    def irecv(self, x: Tensor, source: int, group: Group = None) -> StagedWork:
        host = _room(x)
        return StagedWork(dist.irecv(host, source, group=group), x, host)

    def P2POp(self, operation: Any, x: Tensor, peer: int, group: Group = None) -> Any:
        return lambda: operation(x, peer, group=group)

    def batch_isend_irecv(self, operations: Sequence[Any]) -> list[StagedWork]:
        return [operation() for operation in operations]

    def all_to_all_single(
        self,
        received: Tensor,
        x: Tensor,
        receive_sizes: list[int],
        send_sizes: list[int],
        group: Group = None,
        async_op: bool = False,
    ) -> StagedWork:
        host = _room(received)
        work = dist.all_to_all_single(host, _sent(x), receive_sizes, send_sizes, group=group, async_op=True)
        return _done(StagedWork(work, received, host), async_op)

    def all_gather(self, gathered: Tensor, x: Tensor, group: Group = None, async_op: bool = False) -> StagedWork:
        host = _room(gathered)
        work = dist.all_gather_into_tensor(host, _sent(x), group=group, async_op=True)
        return _done(StagedWork(work, gathered, host), async_op)

    def all_reduce(self, x: Tensor, group: Group = None) -> None:
        host = _sent(x)
        StagedWork(dist.all_reduce(host, group=group, async_op=True), x, host).wait()

    def broadcast(self, x: Tensor, source: int, group: Group = None, async_op: bool = False) -> StagedWork:
        host = _sent(x)
        work = dist.broadcast(host, source, group=group, async_op=True)
        return _done(StagedWork(work, x, host), async_op)


@contextmanager
def through_host_memory() -> Iterator[None]:
    """While it is entered, this rank's messages, of whatever device, go through host memory."""
    staged = StagedDistributed()
    with mock.patch.object(axis, "dist", staged), mock.patch.object(axis, "_all_gather", staged.all_gather):
        yield


def _sent(x: Tensor) -> Tensor:
    """A copy in host memory. It waits for what the device has yet to compute of it."""
    assert x.is_contiguous()
    return x.to("cpu", copy=True)


def _room(x: Tensor) -> Tensor:
    assert x.is_contiguous()
    return torch.empty_like(x, device="cpu")


def _done(work: StagedWork, async_op: bool) -> StagedWork:
    if not async_op:
        work.wait()
    return cast(StagedWork, work)
