"""Events that the sidecar sends while a request runs, and its replies."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from .base import Challenge, Count, Index, Message, Welcome

Phase = Literal["load", "encode text", "compile", "sample", "decode", "encode image"]


class Begun(Message):
    """All ranks have the request and agree on it. A sidecar that is lost before may be replaced, and asked again."""

    type: Literal["begun"] = "begun"
    id: Count


class Progress(Message):
    type: Literal["progress"] = "progress"
    id: Count
    phase: Phase
    step: Count
    total: Count


class Log(Message):
    type: Literal["log"] = "log"
    id: Count
    level: Literal["info", "warning"]
    text: str


class Memory(Message):
    """Bytes in use and free on every rank's device, at the end of a run."""

    type: Literal["memory"] = "memory"
    id: Count
    used: tuple[Count, ...]
    free: tuple[Count, ...]


class Evaluations(Message):
    """At the end of a run with a step cache: how many evaluations were computed in full, of how many. They are those of
    the prompts that rank 0 evaluates."""

    type: Literal["evaluations"] = "evaluations"
    id: Count
    computed: Count
    total: Count

    def __str__(self) -> str:
        return f"Step cache: {self.computed} of {self.total} evaluations computed in full."


class Heartbeat(Message):
    """Sent every second on every connection. `oldest_beat_s`: seconds since the quietest rank was last alive."""

    type: Literal["heartbeat"] = "heartbeat"
    oldest_beat_s: float = Field(ge=0.0, le=1e12)
    quietest_rank: Index


class Result(Message):
    """The end of a request that worked."""

    type: Literal["result"] = "result"
    id: Count
    data: dict[str, object] = Field(default_factory=dict)


class Failure(Message):
    """The end of a request that did not. Code "user": `UserError`; "crash": a fault of ours, `message` names it.

    `rank` is set when the ranks left the request out of step, led by that rank: then the sidecar ends.
    """

    type: Literal["failure"] = "failure"
    id: Count
    code: Literal["user", "cancelled", "crash", "protocol"]
    message: str
    hint: str = ""
    rank: Index | None = None


FROM_SIDECAR: TypeAdapter[
    Challenge | Welcome | Begun | Progress | Log | Memory | Evaluations | Heartbeat | Result | Failure
] = TypeAdapter(
    Annotated[
        Challenge | Welcome | Begun | Progress | Log | Memory | Evaluations | Heartbeat | Result | Failure,
        Field(discriminator="type"),
    ]
)
