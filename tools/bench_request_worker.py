"""The ranks of `bench_request.py`: the real rank loop around an engine that returns what it got."""

from __future__ import annotations

import torch

from parallel_backend.protocol import messages
from parallel_backend.run_context import Run
from parallel_backend.worker.__main__ import main


class Mirror:
    """Has no groups to leave or to form."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def handle(
        self, request: messages.AnyRequest, tensors: dict[str, torch.Tensor], run: Run
    ) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
        return {}, tensors

    def status(self) -> dict[str, object]:
        return {}

    def abandon(self) -> None:
        pass

    def rejoin(self, run: Run) -> None:
        pass


if __name__ == "__main__":
    main(Mirror)
