"""Sharded weights: ranks that compute with the same blocks keep a share of each, and put it together to use it. Exact.

As ZeRO stage 3 (arXiv 1910.02054) and FSDP (arXiv 2304.11277), but our own: FSDP2 shards what a rank holds whole
already, parameter by parameter into rows, and only where a module is called; here a rank reads its share of the file
alone, and a block, whatever its dtypes and uneven shapes, is one message that the ledger counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.axis import Axis, Exchange
from ..families.blocks import Block
from ..families.state import State
from ..weights.shards import BlockShards


@dataclass
class Slot:
    """A buffer, and which block is in it or on its way."""

    buffer: Tensor
    block: int | None = None
    gather: Exchange | None = None

    def wait(self) -> None:
        if self.gather is not None:
            self.gather.wait()
        self.gather = None


class ShardedWeights:
    """Puts each block's weights together while the block before it computes.

    Blocks take turns in the buffers, so that two of them are whole at a time. On CUDA gathers have a stream of their
    own, which waits until a buffer's last block is done.
    """

    def __init__(self, shards: BlockShards) -> None:
        self._shares = shards.shares
        self._slots = [Slot(buffer) for buffer in shards.buffers]
        self._axis: Axis | None = None
        device = shards.buffers[0].device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            # The model may go while its first block is on its way again, for a step that does not come.
            for buffer in shards.buffers:
                buffer.record_stream(self._stream)

    def begin(self, axis: Axis) -> None:
        """Makes all later gathers use the ranks of `axis`, which all begin together and hold no block."""
        self._axis = axis
        self.settle()

    def settle(self) -> None:
        """Wait for the gathers that are under way; no block is at hand then."""
        for slot in self._slots:
            slot.wait()
            slot.block = None

    def abandon(self) -> None:
        """Drops gathers that may never end."""
        for slot in self._slots:
            slot.gather = None

    def around(self, blocks: Sequence[Block]) -> list[Block]:
        """The blocks, each with its weights at hand while it computes."""
        return [self._around(number, block) for number, block in enumerate(blocks)]

    def hold(self, number: int) -> None:
        """Have the weights of block `number` at hand."""
        self._fetch(number)
        self._receive(number)

    def _around(self, number: int, block: Block) -> Block:
        following = (number + 1) % len(self._shares)

        def gathered(state: State) -> State:
            self.hold(number)
            if following > number:
                self._fetch(following)
            state = block(state)
            # The last block may be in the first one's buffer.
            if following <= number:
                self._fetch(following)
            return state

        return gathered

    def _slot(self, number: int) -> Slot:
        return self._slots[number % len(self._slots)]

    def _fetch(self, number: int) -> None:
        """Begin to put block `number` together, unless it is there or on its way."""
        slot, axis, share = self._slot(number), self._axis, self._shares[number]
        assert axis is not None
        if slot.block == number:
            return
        slot.wait()
        whole = slot.buffer[: share.numel() * axis.size]
        with self._own_stream():
            if axis.size > 1 and share.device != whole.device:
                share = whole.view(axis.size, -1)[axis.rank].copy_(share, non_blocking=True)
            slot.gather = axis.start_all_gather(share, whole)
        slot.block = number

    def _receive(self, number: int) -> None:
        self._slot(number).wait()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _own_stream(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)
