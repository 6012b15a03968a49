"""The real rank loop around an engine that works, fails, hangs or dies as the prompt of its request tells it."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from parallel_backend.errors import UserError
from parallel_backend.worker.__main__ import main


class StandIn:
    """Takes an EncodeText request: `prompt` is "<what> [<rank>]"; without a rank all of them do it."""

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.handled = 0

    def status(self) -> dict[str, object]:
        return {"models": [], "handled": self.handled}

    def abandon(self):
        """In vain: ranks wait for each other in the default group, which cannot be left."""

    def rejoin(self, run):
        """There is nothing to form anew."""

    def handle(self, request, tensors, run):
        self.handled += 1
        run.gather(None)
        run.begun()
        what, _, rank = request.prompt.partition(" ")
        if rank == "" or int(rank) == self.rank:
            getattr(self, what)(tensors, run)
        total = torch.tensor([float(self.rank)])
        dist.all_reduce(total)
        return {"sum": float(total), "pids": run.gather(os.getpid())}, tensors

    def echo(self, tensors, run):
        run.progress("encode text", 1, 1, preview=tensors.get("tokens"))

    def steps(self, tensors, run):
        self.step(run, 200, 0.05)

    def some_steps(self, tensors, run):
        self.step(run, 80, 0.05)

    def walk(self, tensors, run):
        self.step(run, 20, 0.02)

    def step(self, run, count, seconds):
        for step in range(count):
            run.progress("sample", step + 1, count)
            run.check_cancelled()
            time.sleep(seconds)

    def user_error(self, tensors, run):
        raise UserError("This prompt cannot be encoded.", "Use another.")

    def crash(self, tensors, run):
        raise ValueError("the stand-in was told to crash")

    def die(self, tensors, run):
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(self, tensors, run):
        os.kill(os.getpid(), signal.SIGSTOP)

    def flood(self, tensors, run):
        for _ in range(1000):
            print("x" * 999)


if __name__ == "__main__":
    main(StandIn)
