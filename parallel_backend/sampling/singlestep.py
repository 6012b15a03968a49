"""Samplers without memory: each step needs only the latent that the step before left."""

from __future__ import annotations

from torch import Tensor

from .solver import (
    Denoise,
    Solver,
    SolverContext,
    ancestral_step,
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
    sampling = context.model_sampling
    sigmas = sampling.finite_half_log_snr(sigmas)

    def advance(x: Tensor, denoised: Tensor, sigma: Tensor, target: Tensor) -> Tensor:
        lambda_from, lambda_to = sampling.half_log_snr(sigma), sampling.half_log_snr(target)
        alpha_from, alpha_to = sigma * lambda_from.exp(), target * lambda_to.exp()
        down, added = split_variance((-lambda_from).exp(), (-lambda_to).exp(), eta)
        keep = (lambda_from + down.log()).exp()
        noise = context.noise(sigma, target)
        return (alpha_to / alpha_from) * keep * x + alpha_to * ((1 - keep) * denoised + added * noise)

    for i in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        denoised = yield Denoise(x, sigma, i)
        if sigma_next == 0:
            return denoised
        middle = sampling.sigma_from_half_log_snr(
            sampling.half_log_snr(sigma).lerp(sampling.half_log_snr(sigma_next), 0.5)
        )
        x_middle = advance(x, denoised, sigma, middle)
        denoised_middle = yield Denoise(x_middle, middle, i, evaluation=1)
        x = advance(x, denoised_middle, sigma, sigma_next)
    return x


def lcm(x: Tensor, sigmas: Tensor, context: SolverContext) -> Solver:
    """Latent consistency sampling (Luo et al. 2023): denoise at once, then add noise up to the next level."""
    for i in range(len(sigmas) - 1):
        x = yield Denoise(x, sigmas[i], i)
        if sigmas[i + 1] > 0:
            x = context.model_sampling.noise_scaling(sigmas[i + 1], context.noise(sigmas[i], sigmas[i + 1]), x)
    return x
