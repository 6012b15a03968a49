"""How ranks leave a request, one by one and together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..failures import STAY_READY, Outcome
from ..protocol import messages

_SEVERITY = ("crash", "user", "lost", "cancelled", "ok")


@dataclass(frozen=True)
class Verdict:
    """How a request ended on all ranks together. `failure` is None when it worked; `rank`: whose failure says most.

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
