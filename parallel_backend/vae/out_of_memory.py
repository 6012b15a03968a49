"""Handles a rank that runs out of memory during a job that all ranks share: the others do not wait for it forever."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..distributed.axis import Axis, Exchange
from ..failures import is_out_of_memory


class OutOfMemory(Exception):
    """Raised on all ranks alike: `ranks` (places in the axis) ran out of memory."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(f"ranks {ranks} ran out of memory")
        self.ranks = ranks


CHECKED = 32
"""Collectives from one check to the next. A check costs about one of them; a decode of Flux.1 has about 100."""

Check = Callable[[], None]
"""A collective that raises on all ranks or on none, where the work is to be left."""


class CountedAxis(Axis):
    """An axis that counts the collectives that this rank has begun, and calls `check` among them."""

    def __init__(self, axis: Axis, check: Check, begun: int = 0) -> None:
        super().__init__(axis.name, axis.ranks, axis.group, axis.ledger)
        self.begun = begun
        self._check = check

    def _record(self, operation: str, bytes: int, messages: int) -> None:
        super()._record(operation, bytes, messages)
        self.begun += 1
        if self.begun % CHECKED == 0:
            self._check()


class CountingBands(CountedAxis):
    """Lets a job be repeated with tensors on the meta device: shapes only, which need no memory.

    The first `begun` collectives, in which this rank took part before, are left out. To the others it gives zeros.
    """

    def __init__(self, axis: Axis, check: Check, begun: int, device: torch.device) -> None:
        super().__init__(axis, check, begun)
        self._to_skip = begun
        self._device = device

    def start_all_to_all(self, x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Exchange:
        if self._is_due():
            super().start_all_to_all(self._zeros(x), send_sizes, receive_sizes).wait()
        return Exchange(x.new_empty(sum(receive_sizes)), x, [])

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        if self._is_due():
            super().all_gather(self._zeros(x), sizes, dim)
        shape = list(x.shape)
        shape[dim] = sum(sizes)
        return x.new_empty(shape)

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._is_due():
            super().all_reduce(self._zeros(x))
        return x

    def _is_due(self) -> bool:
        self._to_skip -= 1
        return self._to_skip < 0

    def _zeros(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=x.dtype, device=self._device)


def unless_out_of_memory(work: Callable[[], Tensor]) -> Tensor | None:
    """What `work` gives, None when this rank ran out of memory in it. Nothing of it stays in memory then."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release()
    return None


def check_all_had_memory(axis: Axis, mine: bool) -> None:
    """A collective: raise `OutOfMemory` on all ranks unless each had enough."""
    lacking = torch.zeros(axis.size, dtype=torch.int64)
    lacking[axis.rank] = not mine
    if axis.size > 1:
        # On the CPU, whatever the axis computes on: a message of a few bytes.
        axis.all_reduce(lacking)
    if lacking.any():
        release()
        raise OutOfMemory(lacking.nonzero().flatten().tolist())


def release() -> None:
    """Give what was freed back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
