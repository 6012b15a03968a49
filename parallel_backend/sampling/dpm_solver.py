"""DPM-Solver (Lu et al. 2022, arXiv 2206.00927) in t = -log sigma, in variance-exploding space: fast and adaptive."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .solver import Denoise, Solver, SolverContext, slope


def dpm_fast(x: Tensor, sigmas: Tensor, context: SolverContext) -> Solver:
    """As many evaluations as the run has steps, in steps of order 3 that end with what is left.

    The run's first and last level above 0 count, not those between. Each evaluation is told as a step.
    """
    evaluations = len(sigmas) - 1
    thirds, rest = divmod(evaluations, 3)
    orders = [3] * thirds + [rest] if rest else [3] * (thirds - 1) + [2, 1]
    start, end = _ends(sigmas)
    times = torch.linspace(float(start), float(end), len(orders) + 1, dtype=start.dtype)
    done = 0
    for i, order in enumerate(orders):
        shares = [number / order for number in range(1, order)]
        slopes: list[Tensor] = []
        while len(slopes) < order:
            at, time = _stage(x, times[i], times[i + 1], slopes, shares)
            sigma = torch.exp(-time)
            slopes.append(slope(at, (yield Denoise(at, sigma, done)), sigma))
            done += 1
        x, _ = _stage(x, times[i], times[i + 1], slopes, shares)
    return x


REL_TOLERANCE, ABS_TOLERANCE = 0.05, 0.0078
FIRST_STEP, LEAST_FACTOR = 0.05, 0.81
SMALLEST_REST = 1e-5


def dpm_adaptive(x: Tensor, sigmas: Tensor, context: SolverContext) -> Solver:
    """Steps of order 3 whose lengths follow from their difference to order 2, over the whole batch.

    The run's first and last level above 0 count, not how many steps it has: its last step goes on until the end.
    """
    (time, end), last_step = _ends(sigmas), len(sigmas) - 2
    h, previous, attempts = FIRST_STEP, x, 0
    while time < end - SMALLEST_REST:
        target = torch.minimum(end, time + h)
        shares, slopes = [1 / 3, 2 / 3], []
        while len(slopes) < 3:
            at, stage_time = _stage(x, time, target, slopes, shares)
            sigma, number = torch.exp(-stage_time), len(slopes)
            slopes.append(slope(at, (yield Denoise(at, sigma, min(attempts, last_step), number)), sigma))
        low, _ = _stage(x, time, target, slopes[:2], shares[:1])
        high, _ = _stage(x, time, target, slopes, shares)
        tolerance = (REL_TOLERANCE * torch.maximum(low.abs(), previous.abs())).clamp(min=ABS_TOLERANCE)
        error = float(torch.linalg.norm((low - high) / tolerance)) / x.numel() ** 0.5
        factor = 1 + math.atan((1 / (error + 1e-8)) ** (1 / 3) - 1)
        h *= factor
        attempts += 1
        if factor >= LEAST_FACTOR:
            x, previous, time = high, low, target
    return x


def _ends(sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """The times of a run's first level and of its last one above 0."""
    return -sigmas[0].log(), -(sigmas[-1] if sigmas[-1] > 0 else sigmas[-2]).log()


def _stage(
    x: Tensor, time: Tensor, target: Tensor, slopes: Sequence[Tensor], shares: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """x at the next stage of a step from `time` to `target`, and its time: at the end once `slopes` are all known.

    `slopes`: at `time` and at those of the `shares` of the step that are known.
    """
    if not slopes:
        return x, time
    share = shares[len(slopes) - 1] if len(slopes) <= len(shares) else 1.0
    h = share * (target - time)
    sigma = torch.exp(-(time + h))
    moved = x - sigma * torch.expm1(h) * slopes[0]
    if len(slopes) > 1:
        order_3 = len(shares) > 1
        weight = torch.expm1(h) / h - 1 if order_3 else torch.expm1(h) / 2
        moved = moved - sigma * share / shares[len(slopes) - 2] * weight * (slopes[-1] - slopes[0])
    return moved, time + h
