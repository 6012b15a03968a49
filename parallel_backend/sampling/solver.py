"""What all samplers share: the generator's contract and the moves between noise levels."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .model_sampling import FlowSampling, ModelSampling

NoiseSource = Callable[[Tensor, Tensor], Tensor]
"""`noise(sigma, sigma_next)`: unit Gaussian noise of the sampler's x for the way between two noise levels."""


@dataclass(frozen=True)
class Denoise:
    """A sampler's call of the model: the clean latent that `x` `[B, C, ...]` shows at noise level `sigma` (0-d, CPU).

    `step` counts from 0; `evaluation` counts the calls of one step, from 0.
    """

    x: Tensor
    sigma: Tensor
    step: int
    evaluation: int = 0


@dataclass(frozen=True)
class SolverContext:
    model_sampling: ModelSampling
    noise: NoiseSource


Solver = Generator[Denoise, Tensor, Tensor]
"""Yields calls, is sent denoised latents, returns the final x."""

SolverFunction = Callable[[Tensor, Tensor, SolverContext], Solver]
"""`f(x, sigmas, context)` with x at `sigmas[0]`; sigmas `[steps + 1]`, descending, fp32 on the CPU, so that reading
a coefficient never waits for a device."""


def slope(x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """dx/dsigma of the probability flow ODE (Karras et al. 2022, eq. 3)."""
    return (x - denoised) / sigma


def toward(x: Tensor, denoised: Tensor, sigma: Tensor, target: Tensor) -> Tensor:
    """x at `target`, on the straight line from x at `sigma` to `denoised` at 0: one Euler step."""
    return x + slope(x, denoised, sigma) * (target - sigma)


def log_midpoint(sigma: Tensor, target: Tensor) -> Tensor:
    return sigma.log().lerp(target.log(), 0.5).exp()


def split_variance(sigma: Tensor, target: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """An ancestral step in variance-exploding space: (level to step down to, deviation of the noise to add)."""
    added = (eta * (target**2 * (sigma**2 - target**2) / sigma**2) ** 0.5).minimum(target)
    return (target**2 - added**2) ** 0.5, added


class AncestralStep(NamedTuple):
    """Step down to `down`; then x <- `keep` x + `add` noise is at the wanted level."""

    down: Tensor
    keep: Tensor | float
    add: Tensor


def ancestral_step(model_sampling: ModelSampling, sigma: Tensor, target: Tensor, eta: float) -> AncestralStep:
    """How to reach `target` from `sigma` with a share `eta` of fresh noise."""
    if not isinstance(model_sampling, FlowSampling):
        down, added = split_variance(sigma, target, eta)
        return AncestralStep(down, 1.0, added)
    down = target * (1 + (target / sigma - 1) * eta)
    keep = (1 - target) / (1 - down)
    variance = target**2 - down**2 * (1 - target) ** 2 / (1 - down) ** 2
    return AncestralStep(down, keep, variance.clamp(min=0) ** 0.5)
