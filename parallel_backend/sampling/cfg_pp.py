"""Samplers of CFG++ (Chung et al. 2024, arXiv 2406.08070).

They move to the guided prediction, and renoise with the noise that the negative prompt alone predicts. A sampler that
differs from one of classifier-free guidance in nothing else is that one with its argument `cfg_pp`.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from .solver import Denoise, Solver, SolverContext, log_midpoint, slope, split_variance


def euler_ancestral(x: Tensor, sigmas: Tensor, context: SolverContext, eta: float = 1.0) -> Solver:
    """DDIM's stochastic step, in the model's own alpha; with `eta` 0 DDIM's step."""
    sampling = context.model_sampling
    alphas = sigmas * sampling.half_log_snr(sigmas).exp()
    for i, ((sigma, sigma_next), (alpha, alpha_next)) in enumerate(
        zip(pairwise(sigmas), pairwise(alphas), strict=True)
    ):
        denoised = yield Denoise(x, sigma, i)
        if sigma_next == 0:
            return denoised
        down, added = split_variance(sigma / alpha, sigma_next / alpha_next, eta)
        x = alpha_next * (denoised + down * slope(x, alpha * context.negative(), sigma))
        if eta > 0:
            x = x + alpha_next * added * context.noise(sigma, sigma_next)
    return x


def dpmpp_2s_ancestral(x: Tensor, sigmas: Tensor, context: SolverContext) -> Solver:
    """DPM-Solver++(2S) with fresh noise, in variance-exploding space for every model."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = yield Denoise(x, sigma, i)
        if sigma_next == 0:
            return denoised
        down, added = split_variance(sigma, sigma_next, 1.0)
        middle = log_midpoint(sigma, down)
        x_middle = denoised + middle / sigma * (x - context.negative())
        denoised_middle = yield Denoise(x_middle, middle, i, evaluation=1)
        ratio = down / sigma
        x = ratio * (x + denoised - context.negative()) + (1 - ratio) * denoised_middle
        x = x + added * context.noise(sigma, sigma_next)
    return x
