"""Stands in for a sidecar: remembers every request and answers it at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from paralleldit.launcher.spec import SidecarSpec
from paralleldit.parallel_backend.errors import Cancelled
from paralleldit.parallel_backend.protocol import messages

Answer = Callable[[Any, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def _decoded(message: messages.Decode, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    batch, _, height, width = tensors["latent"].shape
    return {"image": torch.full((batch, 8 * height, 8 * width, 3), 0.5)}


ANSWERS: dict[type, Answer] = {
    messages.EncodeText: lambda message, tensors: {"tokens": torch.ones(1, 4, 8), "pooled": torch.ones(1, 6)},
    messages.Sample: lambda message, tensors: {"latent": tensors["latent"] + 1},
    messages.Decode: _decoded,
    messages.EncodeImage: lambda message, tensors: {"latent": tensors["image"].mean(-1)[:, None, ::8, ::8]},
}
DATA = {
    messages.Status: {
        "uptime_s": 61.0,
        "models": [{"kind": "model", "path": "/models/flux", "bytes": 24_000_000_000}],
        "ranks": [{"rank": 1, "host": "node", "memory": {"used": 12_000_000_000, "free": 5_000_000_000}}],
        "traffic": {"cfg2": {"cfg all_gather": {"bytes": 2_000_000, "messages": 4}}},
    },
    messages.Unload: {"freed_bytes": [1_000_000_000, 2_000_000_000]},
}


class FakeClient:
    def __init__(self, ranks: int = 2) -> None:
        self.welcome = messages.Welcome(version=messages.PROTOCOL_VERSION, ranks=ranks, device="cpu", pid=1)
        self.specs: list[SidecarSpec] = []
        self.sent: list[tuple[Any, dict[str, torch.Tensor]]] = []
        self.fault: Exception | None = None

    def ensure(self, spec: SidecarSpec, on_progress: Any, *, owned: bool = True) -> FakeClient:
        on_progress("starting")
        self.specs.append(spec)
        self.welcome = self.welcome.model_copy(update={"ranks": spec.ranks})
        return self

    def close(self) -> None:
        """A stand-in has no connection."""

    def request(
        self, message: Any, tensors: Any = None, on_event: Any = None, cancelled: Any = None, timeout: Any = None
    ) -> Any:
        self.sent.append((message, dict(tensors or {})))
        if self.fault:
            fault, self.fault = self.fault, None
            raise fault
        if isinstance(message, messages.Sample):
            steps = message.schedule.steps if message.schedule else len(tensors["sigmas"]) - 1
            for step in range(1, steps + 1):
                if cancelled():
                    raise Cancelled("Cancelled.")
                on_event(messages.Progress(id=message.id, phase="sample", step=step, total=steps), {})
        answer = ANSWERS.get(type(message), lambda message, tensors: {})
        return messages.Result(id=message.id, data=DATA.get(type(message), {})), answer(message, self.sent[-1][1])

    def last(self, kind: type) -> tuple[Any, dict[str, torch.Tensor]]:
        return next(each for each in reversed(self.sent) if isinstance(each[0], kind))
