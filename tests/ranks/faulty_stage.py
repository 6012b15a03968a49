"""The real engine, in which a rank does what the request says in the middle of it.

Between two blocks of a model what the run's seed says, and the rank that it says; in rank 1's band of a picture what
the overlap of tiles says, for which a decode in bands has no other use.
"""

from __future__ import annotations

import os
import signal
from functools import partial

import torch
import torch.distributed as dist

from parallel_backend.distributed.row_bands import Bands
from parallel_backend.engine import model
from parallel_backend.engine.engine import Engine
from parallel_backend.engine.model import Transformer
from parallel_backend.vae import distribute
from parallel_backend.worker.__main__ import main

WORKS, RAISES, DIES, LACKS_MEMORY = range(4)
RANK = 10
"""A seed is what happens, and so many for each rank before the one that it happens to."""
BLOCKS = 9
"""Of a run, that are computed before."""
CONVOLUTIONS = 5
"""Of a decode, that work before one runs out of memory."""


class FaultyTransformer(Transformer):
    left, what = -1, WORKS

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._blocks = [partial(self._after_fault, block) for block in self._blocks]

    def _after_fault(self, block, state):
        FaultyTransformer.left -= 1
        if FaultyTransformer.left == 0:
            if self.what == RAISES:
                raise ValueError("this rank was told to fail")
            if self.what == LACKS_MEMORY:
                raise torch.OutOfMemoryError("this rank was told to run out of memory")
            if self.what == DIES:
                os.kill(os.getpid(), signal.SIGKILL)
        return block(state)


class FaultyBands(Bands):
    left = None

    def _conv2d(self, *args, **kwargs):
        if FaultyBands.left is not None:
            FaultyBands.left -= 1
            if FaultyBands.left < 0:
                FaultyBands.left = None
                raise torch.OutOfMemoryError("this band was told to run out of memory")
        return super()._conv2d(*args, **kwargs)


class FaultyEngine(Engine):
    def _sample(self, request, *rest):
        rank, FaultyTransformer.what = divmod(request.seed, RANK)
        FaultyTransformer.left = BLOCKS if rank == dist.get_rank() else -1
        return super()._sample(request, *rest)

    def _decode(self, request, *rest):
        FaultyBands.left = CONVOLUTIONS if dist.get_rank() == 1 and request.overlap == RAISES else None
        return super()._decode(request, *rest)


if __name__ == "__main__":
    model.Transformer = FaultyTransformer
    distribute.Bands = FaultyBands
    main(FaultyEngine)
