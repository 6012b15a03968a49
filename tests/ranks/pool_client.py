"""In the place of a sidecar's client: its requests go to engines in the ranks of the tests' pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from paralleldit.parallel_backend.engine.engine import Engine
from paralleldit.parallel_backend.protocol import messages
from paralleldit.tests.ranks.stale_flux import run_of
from torch import Tensor

if TYPE_CHECKING:
    from paralleldit.tests.ranks.conftest import RankPool

ENGINES: dict[str, Engine] = {}
"""In a rank: the engine of each client."""


def handled(world: Any, client: str, request: messages.AnyRequest, tensors: Mapping[str, Tensor]) -> Any:
    """The engine's answer, its tensors, and the events that this rank sends."""
    engine = ENGINES.setdefault(client, Engine(torch.device("cpu")))
    run, events = run_of(request)
    return *engine.handle(request, dict(tensors), run), events


class PoolClient:
    """Of `count` ranks, whose engines keep their models from one request to the next."""

    def __init__(self, pool: RankPool, count: int) -> None:
        self.pool, self.count = pool, count
        self.name = f"client {id(self)} of {count} ranks"

    def request(
        self,
        request: messages.AnyRequest,
        tensors: Mapping[str, Tensor] | None = None,
        on_event: Callable[..., None] = lambda *_: None,
    ) -> tuple[messages.Result, dict[str, Tensor]]:
        (data, answer, events), *_ = self.pool.run(self.count, handled, self.name, request, tensors or {})
        for event in events:
            on_event(*event)
        return messages.Result(id=request.id, data=data), answer
