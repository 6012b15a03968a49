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
_SEVERITY = ("crash", "user", "cancelled", "ok")


@dataclass(frozen=True)
class Outcome:
    """How one rank left a request."""

    kind: Literal["ok", "user", "cancelled", "crash"]
    message: str = ""
    hint: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """How all ranks together left a request. `failure` is None when it worked, `rank` is the one that tells most."""

    failure: messages.Failure | None
    rank: int
    is_warm: bool


def judge(request: int, outcomes: Mapping[int, Outcome]) -> Verdict:
    """The ranks stay warm when all left the request in the same way, at the same point.

    Where they differ, or where one crashed, collectives are left half done: the sidecar must end.
    """
    worst = min(outcomes, key=lambda rank: (_SEVERITY.index(outcomes[rank].kind), rank))
    outcome = outcomes[worst]
    alike = len({(each.kind, each.message) for each in outcomes.values()}) == 1
    if outcome.kind == "ok":
        return Verdict(None, worst, is_warm=True)
    failure = messages.Failure(
        id=request,
        code=outcome.kind,
        message=outcome.message,
        hint=outcome.hint,
        rank=None if alike and outcome.kind != "crash" else worst,
    )
    return Verdict(failure, worst, is_warm=alike and outcome.kind != "crash")


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
    return Outcome("crash", f"Rank {rank} failed: {type(error).__name__}: {error}", _last_frame(error))


def is_out_of_memory(error: Exception) -> bool:
    """On CPU, torch raises a plain RuntimeError that names its allocator."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


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
