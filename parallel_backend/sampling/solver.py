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


def no_negative() -> Tensor:
    raise AssertionError("a run without a negative prompt was asked for its prediction")


@dataclass(frozen=True)
class SolverContext:
    """`negative()`: what the negative prompt alone predicts in the newest evaluation, for the samplers of CFG++."""

    model_sampling: ModelSampling
    noise: NoiseSource
    negative: Callable[[], Tensor] = no_negative


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


class Level(NamedTuple):
    """A noise level and its lambda. Each is kept as computed: next to pure noise a round trip loses digits."""

    sigma: Tensor
    half_log_snr: Tensor

    @property
    def alpha(self) -> Tensor:
        """How much of the clean latent is in x."""
        return self.sigma * self.half_log_snr.exp()

    @classmethod
    def at(cls, half_log_snr: Tensor, model_sampling: ModelSampling) -> Level:
        return cls(model_sampling.sigma_from_half_log_snr(half_log_snr), half_log_snr)


def levels_of(sigmas: Tensor, model_sampling: ModelSampling) -> list[Level]:
    """A run's levels; the first one has a lambda that is finite."""
    sigmas = model_sampling.finite_half_log_snr(sigmas)
    return [Level(sigma, model_sampling.half_log_snr(sigma)) for sigma in sigmas]


def split_variance(sigma: Tensor, target: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """An ancestral step in variance-exploding space: (level to step down to, deviation of the noise to add)."""
    if eta == 0:
        return target, target.new_zeros(())
    # The level of pure noise is infinite where alpha is 0: all that is wanted is then added.
    added = (eta * (target**2 * (sigma**2 - target**2) / sigma**2) ** 0.5).fmin(target)
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
