"""The real engine, in which rank 1 does what the request says in the middle of it.

In its stage of a pipeline what the run's seed says; in its band of a picture what the overlap of tiles says, for which
a decode in bands has no other use.
"""

from __future__ import annotations

import os
import signal

import torch
import torch.distributed as dist

from parallel_backend import sample_request
from parallel_backend.engine import Engine
from parallel_backend.strategies.pipefusion import PipeFusion
from parallel_backend.vae import spread
from parallel_backend.vae.bands import Bands
from parallel_backend.worker import main

WORKS, RAISES, DIES = range(3)
CONVOLUTIONS = 5
"""Of a decode, that work before one runs out of memory."""


class FaultyStage(PipeFusion):
    def __init__(self, family, mesh, attention, guidance, job, **more):
        super().__init__(family, mesh, attention, guidance, job, **more)
        self.seed = job.seed

    def _through_blocks(self, unit, *rest):
        if dist.get_rank() == 1 and unit.question == 3 and unit.patches[0] == 1:
            if self.seed == RAISES:
                raise ValueError("this stage was told to fail")
            if self.seed == DIES:
                os.kill(os.getpid(), signal.SIGKILL)
        return super()._through_blocks(unit, *rest)


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
    def _decode(self, request, *rest):
        FaultyBands.left = CONVOLUTIONS if dist.get_rank() == 1 and request.overlap == RAISES else None
        return super()._decode(request, *rest)


if __name__ == "__main__":
    sample_request.PipeFusion = FaultyStage
    spread.Bands = FaultyBands
    main(FaultyEngine)
