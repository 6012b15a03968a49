"""How ranks leave a request, one by one and together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from .errors import Cancelled, UserError
from .protocol import messages

GIB = 1 << 30
_SEVERITY = ("crash", "user", "lost", "cancelled", "ok")
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


@dataclass(frozen=True)
class Verdict:
    """How all ranks together left a request. `failure` is None when it worked, `rank` is the one that tells most.

    `is_warm`: they can serve the next one, for which they form their groups anew unless they are in step.
    """

    failure: messages.Failure | None
    rank: int
    is_warm: bool
    in_step: bool


def judge(request: int, outcomes: Mapping[int, Outcome], *, can_regroup: bool) -> Verdict:
    """The ranks are in step when all left the request in the same way, at the same point.

    Where they differ, or where one crashed, collectives are left half done. Groups of gloo can then be left and formed
    anew (`can_regroup`). With NCCL that is not attempted, for want of a machine to try it on: the sidecar must end.
    """
    worst = min(outcomes, key=lambda rank: (_SEVERITY.index(outcomes[rank].kind), rank))
    outcome = outcomes[worst]
    alike = len({(each.kind, each.message) for each in outcomes.values()}) == 1
    if outcome.kind == "ok":
        return Verdict(None, worst, is_warm=True, in_step=True)
    in_step = alike and not outcome.is_broken and not any(each.gave_up for each in outcomes.values())
    is_warm = in_step or can_regroup
    failure = messages.Failure(
        id=request,
        code="cancelled" if outcome.kind == "cancelled" else "user" if is_warm or outcome.kind == "user" else "crash",
        message=outcome.message,
        hint=outcome.hint if in_step or not is_warm else f"{outcome.hint} {STAY_READY}".strip(),
        rank=None if is_warm else worst,
    )
    return Verdict(failure, worst, is_warm=is_warm, in_step=in_step)


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
    """On CPU, torch raises a plain RuntimeError that names its allocator."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def is_lost_connection(error: Exception) -> bool:
    """To another rank, over gloo, which names the file of its own that raised."""
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def _memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def _last_frame(error: Exception) -> str:
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next:
        trace = trace.tb_next
    return f"Raised in {os.path.basename(trace.tb_frame.f_code.co_filename)}, line {trace.tb_lineno}."
