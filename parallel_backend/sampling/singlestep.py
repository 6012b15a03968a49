"""Samplers without memory: each step needs only the latent that the step before left."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .solver import (
    Denoise,
    Level,
    Solver,
    SolverContext,
    ancestral_step,
    levels_of,
    log_midpoint,
    slope,
    split_variance,
    toward,
)


def euler(x: Tensor, sigmas: Tensor, context: SolverContext) -> Solver:
    """Euler's method (Karras et al. 2022, algorithm 2 without churn)."""
    for i in range(len(sigmas) - 1):
        denoised = yield Denoise(x, sigmas[i], i)
        x = toward(x, denoised, sigmas[i], sigmas[i + 1])
    return x


def euler_ancestral(x: Tensor, sigmas: Tensor, context: SolverContext, eta: float = 1.0) -> Solver:
    """Euler steps that go too far down and add fresh noise."""
    for i in range(len(sigmas) - 1):
        denoised = yield Denoise(x, sigmas[i], i)
        if sigmas[i + 1] == 0:
            return denoised
        step = ancestral_step(context.model_sampling, sigmas[i], sigmas[i + 1], eta)
        x = toward(x, denoised, sigmas[i], step.down)
        x = step.keep * x + step.add * context.noise(sigmas[i], sigmas[i + 1])
    return x


def heun(x: Tensor, sigmas: Tensor, context: SolverContext) -> Solver:
    """Heun's method (Karras et al. 2022, algorithm 2 without churn)."""
    for i in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        denoised = yield Denoise(x, sigma, i)
        guess = toward(x, denoised, sigma, sigma_next)
        if sigma_next == 0:
            return guess
        denoised_next = yield Denoise(guess, sigma_next, i, evaluation=1)
        mean_slope = (slope(x, denoised, sigma) + slope(guess, denoised_next, sigma_next)) / 2
        x = x + mean_slope * (sigma_next - sigma)
    return x


def heunpp2(x: Tensor, sigmas: Tensor, context: SolverContext) -> Solver:
    """Heun++: slopes at up to three levels, later ones weighted by sigma (Carzit's sd-webui-samplers-scheduler)."""
    for i in range(len(sigmas) - 1):
        ahead = sigmas[i + 1 : i + 3][: len(sigmas) - 2 - i]
        denoised = yield Denoise(x, sigmas[i], i)
        slopes, guess = [slope(x, denoised, sigmas[i])], x
        for number, sigma in enumerate(ahead, 1):
            guess = guess + slopes[-1] * (sigma - sigmas[i + number - 1])
            denoised = yield Denoise(guess, sigma, i, evaluation=number)
            slopes.append(slope(guess, denoised, sigma))
        weights = [sigma / (len(slopes) * sigmas[0]) for sigma in ahead]
        mean_slope = (1 - sum(weights)) * slopes[0]
        for weight, later in zip(weights, slopes[1:], strict=True):
            mean_slope = mean_slope + weight * later
        x = x + mean_slope * (sigmas[i + 1] - sigmas[i])
    return x


def dpm_2(x: Tensor, sigmas: Tensor, context: SolverContext) -> Solver:
    """The midpoint rule, with the midpoint in log sigma (DPM-Solver-2, Lu et al. 2022)."""
    for i in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        denoised = yield Denoise(x, sigma, i)
        if sigma_next == 0:
            return toward(x, denoised, sigma, sigma_next)
        middle = log_midpoint(sigma, sigma_next)
        x_middle = toward(x, denoised, sigma, middle)
        denoised = yield Denoise(x_middle, middle, i, evaluation=1)
        x = x + slope(x_middle, denoised, middle) * (sigma_next - sigma)
    return x


def dpm_2_ancestral(x: Tensor, sigmas: Tensor, context: SolverContext, eta: float = 1.0) -> Solver:
    """`dpm_2` with steps that go too far down and add fresh noise."""
    for i in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        denoised = yield Denoise(x, sigma, i)
        if sigma_next == 0:
            return toward(x, denoised, sigma, sigma_next)
        step = ancestral_step(context.model_sampling, sigma, sigma_next, eta)
        middle = log_midpoint(sigma, step.down)
        x_middle = toward(x, denoised, sigma, middle)
        denoised = yield Denoise(x_middle, middle, i, evaluation=1)
        x = x + slope(x_middle, denoised, middle) * (step.down - sigma)
        x = step.keep * x + step.add * context.noise(sigma, sigma_next)
    return x


def dpmpp_2s_ancestral(x: Tensor, sigmas: Tensor, context: SolverContext, eta: float = 1.0) -> Solver:
    """DPM-Solver++(2S) (Lu et al. 2022b): the midpoint in lambda, then fresh noise."""
    model_sampling = context.model_sampling
    for i in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        denoised = yield Denoise(x, sigma, i)
        if sigma_next == 0:
            return toward(x, denoised, sigma, sigma_next)
        step = ancestral_step(model_sampling, sigma, sigma_next, eta)
        start = model_sampling.half_log_snr(sigma)
        if start.isinf():
            # Pure noise of a flow has no lambda to take the middle of.
            middle = sigma.new_tensor(0.9999)
        else:
            middle = model_sampling.sigma_from_half_log_snr(start.lerp(model_sampling.half_log_snr(step.down), 0.5))
        denoised = yield Denoise(toward(x, denoised, sigma, middle), middle, i, evaluation=1)
        x = toward(x, denoised, sigma, step.down)
        x = step.keep * x + step.add * context.noise(sigma, sigma_next)
    return x


def dpmpp_sde(x: Tensor, sigmas: Tensor, context: SolverContext, eta: float = 1.0) -> Solver:
    """DPM-Solver++ for the diffusion SDE, one midpoint in lambda per step (k-diffusion)."""
    levels = levels_of(sigmas, context.model_sampling)

    def advance(x: Tensor, denoised: Tensor, start: Level, target: Level) -> Tensor:
        down, added = split_variance((-start.half_log_snr).exp(), (-target.half_log_snr).exp(), eta)
        h = -down.log() - start.half_log_snr
        noise = context.noise(start.sigma, target.sigma)
        return target.alpha / start.alpha * torch.exp(-h) * x + target.alpha * (
            added * noise - torch.expm1(-h) * denoised
        )

    for i, (start, end) in enumerate(pairwise(levels)):
        denoised = yield Denoise(x, start.sigma, i)
        if end.sigma == 0:
            return denoised
        half_way = start.half_log_snr + (end.half_log_snr - start.half_log_snr) / 2
        middle = Level.at(half_way, context.model_sampling)
        x_middle = advance(x, denoised, start, middle)
        denoised_middle = yield Denoise(x_middle, middle.sigma, i, evaluation=1)
        x = advance(x, denoised_middle, start, end)
    return x


def lcm(x: Tensor, sigmas: Tensor, context: SolverContext) -> Solver:
    """Latent consistency sampling (Luo et al. 2023): denoise at once, then add noise up to the next level."""
    for i in range(len(sigmas) - 1):
        x = yield Denoise(x, sigmas[i], i)
        if sigmas[i + 1] > 0:
            x = context.model_sampling.noise_scaling(sigmas[i + 1], context.noise(sigmas[i], sigmas[i + 1]), x)
    return x


def ddpm(x: Tensor, sigmas: Tensor, context: SolverContext) -> Solver:
    """Ancestral steps of DDPM (Ho et al. 2020, algorithm 2), on x brought to unit variance."""
    for i in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        denoised = yield Denoise(x, sigma, i)
        kept, kept_next = 1 / (sigma**2 + 1), 1 / (sigma_next**2 + 1)
        alpha = kept / kept_next
        x = (kept.sqrt() * x - (1 - alpha) / (1 - kept).sqrt() * slope(x, denoised, sigma)) / alpha.sqrt()
        if sigma_next == 0:
            return x
        x = x + ((1 - alpha) * (1 - kept_next) / (1 - kept)).sqrt() * context.noise(sigma, sigma_next)
        x = x / kept_next.sqrt()
    return x
