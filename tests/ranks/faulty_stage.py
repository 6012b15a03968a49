"""The real engine, in which rank 1's stage of a pipeline does what the run's seed says, in the middle of the run."""

from __future__ import annotations

import os
import signal

import torch.distributed as dist

from parallel_backend import sample_request
from parallel_backend.engine import Engine
from parallel_backend.strategies.pipefusion import PipeFusion
from parallel_backend.worker import main

WORKS, RAISES, DIES = range(3)


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


if __name__ == "__main__":
    sample_request.PipeFusion = FaultyStage
    main(Engine)
