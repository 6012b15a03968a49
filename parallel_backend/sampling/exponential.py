"""Exponential integrators in lambda, the logarithm of signal over noise: SEEDS, exponential Heun, ER-SDE."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .solver import Denoise, Level, Solver, SolverContext, levels_of


def _phi_1(z: Tensor) -> Tensor:
    """h phi_1."""
    return torch.expm1(z)


def _phi_2(z: Tensor) -> Tensor:
    """h phi_2."""
    return (torch.expm1(z) - z) / z


def _half_phi_1(z: Tensor) -> Tensor:
    return torch.expm1(z) / 2


class Stage(NamedTuple):
    """A stage of a step, which reaches the `share` of it in lambda.

    What its change is made of: the step's first prediction, and its difference to the one at the end of the stage
    before, weighted with `weight`.
    """

    share: float
    weight: Callable[[Tensor], Tensor] | None = None


SEEDS_2 = (Stage(1 / 2), Stage(1.0, _half_phi_1))
SEEDS_3 = (Stage(1 / 3), Stage(2 / 3, _phi_2), Stage(1.0, _phi_2))
EXP_HEUN_2 = (Stage(1.0), Stage(1.0, _phi_2))


def seeds(x: Tensor, sigmas: Tensor, context: SolverContext, stages: tuple[Stage, ...], eta: float = 1.0) -> Solver:
    """SEEDS (Gonzalez et al. 2023, arXiv 2305.14267) for data prediction; with `eta` 0 the ODE's exponential steps."""
    for i, (start, end) in enumerate(pairwise(levels_of(sigmas, context.model_sampling))):
        first = newest = yield Denoise(x, start.sigma, i)
        if end.sigma == 0:
            return first
        h = end.half_log_snr - start.half_log_snr
        noise: Tensor | float = 0.0
        reached, reached_share, at_stage = start, 0.0, x
        for number, (share, weight) in enumerate(stages, 1):
            is_last = number == len(stages)
            place = start.half_log_snr.lerp(end.half_log_snr, share)
            level = end if is_last else Level.at(place, context.model_sampling)
            z = -share * h * (1 + eta)
            change = _phi_1(z) * first
            if weight is not None:
                change = change + share / reached_share * weight(z) * (newest - first)
            at_stage = level.sigma / start.sigma * torch.exp(-share * h * eta) * x - level.alpha * change
            if eta > 0:
                passed = (reached_share - share) * h * eta
                fresh = context.noise(reached.sigma, level.sigma)
                noise = torch.exp(passed) * noise + torch.sqrt(-torch.expm1(2 * passed)) * fresh
                at_stage = at_stage + level.sigma * noise
            if not is_last:
                newest = yield Denoise(at_stage, level.sigma, i, evaluation=number)
            reached, reached_share = level, share
        x = at_stage
    return x


ER_SDE_POINTS = 200


def _er_sde_scale(ratio: Tensor) -> Tensor:
    """phi of the paper: how fast noise is renewed at sigma / alpha = `ratio`."""
    return ratio * ((ratio**0.3).exp() + 10.0)


def er_sde(x: Tensor, sigmas: Tensor, context: SolverContext) -> Solver:
    """Extended reverse-time SDE solver of order 3, data prediction (Cui et al. 2023, arXiv 2309.06169)."""
    levels = levels_of(sigmas, context.model_sampling)
    ratios = [torch.exp(-level.half_log_snr) for level in levels]
    history: list[tuple[Tensor, Tensor]] = []
    for i, (start, end) in enumerate(pairwise(levels)):
        denoised = yield Denoise(x, start.sigma, i)
        if end.sigma == 0:
            return denoised
        step = ratios[i + 1] - ratios[i]
        scale = _er_sde_scale(ratios[i + 1])
        kept = scale / _er_sde_scale(ratios[i])
        start_alpha, alpha = start.sigma / ratios[i], end.sigma / ratios[i + 1]
        x = alpha / start_alpha * kept * x + alpha * (1 - kept) * denoised
        derivative = torch.zeros_like(denoised)
        if history:
            width = -step / ER_SDE_POINTS
            points = ratios[i + 1] + torch.arange(ER_SDE_POINTS) * width
            scales = _er_sde_scale(points)
            derivative = (denoised - history[0][0]) / (ratios[i] - ratios[i - 1])
            x = x + alpha * (step + torch.sum(1 / scales) * width * scale) * derivative
            if len(history) > 1:
                second = (derivative - history[0][1]) / ((ratios[i] - ratios[i - 2]) / 2)
                moment = torch.sum((points - ratios[i]) / scales) * width
                x = x + alpha * (step**2 / 2 + moment * scale) * second
        variance = ratios[i + 1] ** 2 - ratios[i] ** 2 * kept**2
        x = x + alpha * variance.clamp(min=0).sqrt() * context.noise(start.sigma, end.sigma)
        history = [(denoised, derivative), *history[:1]]
    return x
