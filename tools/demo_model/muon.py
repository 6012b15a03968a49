"""Muon (Jordan 2024): momentum whose matrix is orthogonalised by Newton-Schulz iterations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import overload

import torch


def orthogonalise(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix of `[rows, columns]`, approximately (quintic Newton-Schulz)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """For weights of two or more dims; convolution kernels count as `[out, in * k * k]`."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes no `closure`: gradients are there."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(buffer, group["momentum"]).reshape(weight.shape[0], -1)
                scale = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5 * ahead.shape[1] ** -0.5 * 8
                weight.add_(orthogonalise(ahead).view_as(weight), alpha=-group["lr"] * scale)
