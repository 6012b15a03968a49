"""UniPC, the unified predictor-corrector (Zhao et al. 2023), multistep, predicting the clean latent, order up to 3."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .solver import Denoise, Solver, SolverContext

MAX_ORDER = 3
TERMINAL_SIGMA = 0.001
"""UniPC divides by its last noise level: a run to zero ends here instead."""


_HALF = torch.tensor([0.5])
"""The weight of the lowest orders, in place of the solution of their linear system (Zhao et al. 2023)."""


@dataclass(frozen=True)
class _Level:
    """A noise level as the variance-preserving process sees it: x / sqrt(1 + sigma^2), alpha^2 + std^2 = 1.

    In fp32 the small levels lose digits here. They are ComfyUI's numbers all the same, so they are kept.
    """

    sigma: Tensor
    alpha: Tensor
    std: Tensor
    half_log_snr: Tensor

    @classmethod
    def of(cls, sigma: Tensor) -> _Level:
        log_alpha = 0.5 * torch.log(1 / (sigma**2 + 1))
        variance = 1.0 - torch.exp(2.0 * log_alpha)
        return cls(sigma, torch.exp(log_alpha), torch.sqrt(variance), log_alpha - 0.5 * torch.log(variance))


class _Update:
    """One step from `levels[-1]` to `target` that uses the last `order` predictions."""

    def __init__(
        self,
        x: Tensor,
        levels: list[_Level],
        predictions: list[Tensor],
        target: _Level,
        order: int,
        bh2: bool,
    ) -> None:
        newest = levels[-1]
        h = target.half_log_snr - newest.half_log_snr
        past = list(zip(levels[-2::-1], predictions[-2::-1], strict=True))[: order - 1]
        ratios = torch.stack([(level.half_log_snr - newest.half_log_snr) / h for level, _ in past] + [h.new_ones(())])
        self.order = order
        self.newest = predictions[-1]
        self.differences = [
            (prediction - self.newest) / ratio for (_, prediction), ratio in zip(past, ratios, strict=False)
        ]
        self.system, self.moments, step_size = _order_conditions(ratios, -h, bh2)
        self.scale = target.alpha * step_size
        self.base = (target.std / newest.std) * x - target.alpha * torch.expm1(-h) * self.newest

    def predict(self) -> Tensor:
        """x at the target, from earlier predictions alone."""
        if self.order == 1:
            return self.base
        weights = _HALF if self.order == 2 else torch.linalg.solve(self.system[:-1, :-1], self.moments[:-1])
        return self.base - self.scale * self._weighted(weights)

    def correct(self, prediction: Tensor) -> Tensor:
        """x at the target, once the model has seen the predicted x."""
        weights = _HALF if self.order == 1 else torch.linalg.solve(self.system, self.moments)
        return self.base - self.scale * (self._weighted(weights) + weights[-1] * (prediction - self.newest))

    def _weighted(self, weights: Tensor) -> Tensor | float:
        return sum((w * d for w, d in zip(weights, self.differences, strict=False)), 0.0)


def _order_conditions(ratios: Tensor, hh: Tensor, bh2: bool) -> tuple[Tensor, Tensor, Tensor]:
    """R, b and B(h) of the linear system R rho = b (theorem 3.1); B(h) is h for bh1 and e^h - 1 for bh2."""
    step_size = torch.expm1(hh) if bh2 else hh
    moments = []
    phi, factorial = torch.expm1(hh) / hh - 1, 1
    for i in range(1, len(ratios) + 1):
        moments.append(phi * factorial / step_size)
        factorial *= i + 1
        phi = phi / hh - 1 / factorial
    system = torch.stack([ratios**i for i in range(len(ratios))])
    return system, torch.stack(moments), step_size


def uni_pc(x: Tensor, sigmas: Tensor, context: SolverContext, bh2: bool = False) -> Solver:
    """UniPC with B(h) = h. `sigmas` holds at least three levels and does not end at 0 (see TERMINAL_SIGMA)."""
    levels = [_Level.of(sigma) for sigma in sigmas]
    steps = len(levels) - 1
    order = min(MAX_ORDER, steps - 1)
    x = x * levels[0].alpha
    predictions = [(yield Denoise(x / levels[0].alpha, sigmas[0], 0))]
    for i in range(1, steps + 1):
        update = _Update(x, levels[:i], predictions, levels[i], min(order, i, steps + 1 - i), bh2)
        x = update.predict()
        if i < steps:
            prediction = yield Denoise(x / levels[i].alpha, sigmas[i], i)
            x = update.correct(prediction)
            predictions = [*predictions, prediction]
    return x / levels[-1].alpha


def uni_pc_bh2(x: Tensor, sigmas: Tensor, context: SolverContext) -> Solver:
    """UniPC with B(h) = e^h - 1."""
    return uni_pc(x, sigmas, context, bh2=True)
