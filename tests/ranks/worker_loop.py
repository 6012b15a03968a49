"""The real loop of a rank around a real engine, without sidecar or socket: for tests of what a request costs."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from paralleldit.parallel_backend.distributed.control_group import ControlGroup
from paralleldit.parallel_backend.engine.engine import Engine
from paralleldit.parallel_backend.protocol import messages, tensors
from paralleldit.parallel_backend.worker.__main__ import Rank
from paralleldit.parallel_backend.worker.board import StoreBoard
from paralleldit.parallel_backend.worker.server import Job

Asked = tuple[messages.AnyRequest, dict[str, torch.Tensor]]


class Requests:
    """In the place of rank 0's socket: what clients ask, and what they are answered."""

    def __init__(self, asked: Sequence[Asked]) -> None:
        self.waiting = deque(
            Job(request, bytearray(b"".join(tensors.pack(given).buffers)), given) for request, given in asked
        )
        self.answers: list[tuple[messages.Message, dict[str, torch.Tensor]]] = []

    def next(self) -> Job:
        return self.waiting.popleft()

    def finish(self, work: Job, reply: messages.Message, given: dict[str, torch.Tensor] | None = None) -> None:
        self.answers.append((reply, given or {}))


def loop_of(rank: int, asked: Sequence[Asked]) -> Rank:
    """This rank, as it is once its sidecar is ready."""
    loop = Rank.__new__(Rank)
    vars(loop).update(
        rank=rank,
        life=Path("/nonexistent"),
        device=torch.device("cpu"),
        can_regroup=True,
        control=ControlGroup(),
        within=ControlGroup(),
        engine=Engine(torch.device("cpu")),
        sequence=0,
        server=Requests(asked) if rank == 0 else None,
        watch=None,
        pulse=SimpleNamespace(sequence=None, is_cancelled=False),
        board=StoreBoard(dist.HashStore()),
    )
    return loop


@contextlib.contextmanager
def counted(loop: Rank, folder: Path) -> Iterator[Counter[str]]:
    """How often the loop's control groups meet ("round trips"), and files under `folder` are asked for ("files")."""
    counts: Counter[str] = Counter()

    def meeting(function: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("group") in (loop.control._group, loop.within._group):
            counts["round trips"] += 1
        return function(*args, **kwargs)

    def looking(function: Any, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], str | Path) and Path(args[0]).is_relative_to(folder):
            counts["files"] += 1
        return function(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for name in ("broadcast", "all_gather", "all_reduce", "barrier"):
            stack.enter_context(mock.patch.object(dist, name, partial(meeting, getattr(dist, name))))
        for owner, name in ((os, "stat"), (os, "scandir"), (os, "listdir"), (io, "open"), (builtins, "open")):
            stack.enter_context(mock.patch.object(owner, name, partial(looking, getattr(owner, name))))
        yield counts
