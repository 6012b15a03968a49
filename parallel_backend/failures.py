"""What an exception means: a user's error, too little memory, a lost rank; and its words."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from .errors import Cancelled, UserError
from .machine import resources

GIB = 1 << 30

STAY_READY = "All ranks left the run, and stay ready."


@dataclass(frozen=True)
class Outcome:
    """How one rank left a request. "lost": in its turn, since it lost the connection to a rank that had left before.

    `gave_up`: it has left the groups that requests use, and so made ranks raise that waited there for it.
    """

    kind: Literal["ok", "user", "cancelled", "crash", "lost"]
    message: str = ""
    hint: str = ""
    gave_up: bool = False

    @property
    def is_broken(self) -> bool:
        """Whether the rank stopped where the others may go on."""
        return self.kind in ("crash", "lost")

    def to_json(self) -> dict[str, str | bool]:
        return asdict(self)


def describe(error: Exception, rank: int, device: torch.device) -> Outcome:
    """The outcome of a rank that raised `error`."""
    if isinstance(error, Cancelled):
        return Outcome("cancelled", str(error))
    if isinstance(error, UserError):
        return Outcome("user", error.message, error.hint)
    if is_out_of_memory(error):
        free, total = _memory(device)
        return Outcome(
            "crash",
            f"Rank {rank} ran out of memory on {device}: {free / GIB:.1f} of {total / GIB:.1f} GiB are free now.",
            "Use a smaller picture or batch, more ranks, or free the memory that other programs hold.",
        )
    kind = "lost" if is_lost_connection(error) else "crash"
    return Outcome(kind, f"Rank {rank} failed: {type(error).__name__}: {error}", _last_frame(error))


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. On CPU, torch raises a plain RuntimeError that names its allocator."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def is_lost_connection(error: Exception) -> bool:
    """Whether gloo lost the connection to another rank; its message names the source file that raised."""
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def _memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    return resources.memory()


def _last_frame(error: Exception) -> str:
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next:
        trace = trace.tb_next
    return f"Raised in {os.path.basename(trace.tb_frame.f_code.co_filename)}, line {trace.tb_lineno}."
