"""SA-Solver (Xue et al. 2023, arXiv 2309.05019): stochastic Adams predictor and corrector of the clean latent."""

from __future__ import annotations

import torch
from torch import Tensor

from .solver import Denoise, Solver, SolverContext

PREDICTOR_ORDER, CORRECTOR_ORDER = 3, 4
NOISE_FROM, NOISE_TO = 0.2, 0.8
"""Noise is renewed within these shares of the sampling time."""


def sa_solver(x: Tensor, sigmas: Tensor, context: SolverContext, evaluate_corrected: bool = False) -> Solver:
    """`evaluate_corrected`: the corrected x is evaluated too (PECE), so that later steps use its prediction."""
    sampling = context.model_sampling
    highest, lowest = (sampling.percent_to_sigma(share) for share in (NOISE_FROM, NOISE_TO))
    sigmas = sampling.finite_half_log_snr(sigmas)
    lambdas = sampling.half_log_snr(sigmas)
    ends_clean = bool(sigmas[-1] == 0)
    predicted, noise, tau = x, torch.zeros_like(x), 0.0
    predictions: list[Tensor] = []
    for i in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        denoised = yield Denoise(predicted, sigma, i)
        predictions = [*predictions[1 - CORRECTOR_ORDER :], denoised]
        # Towards the end, steps are short of levels: lower orders keep them stable.
        left = len(sigmas) - 1 - i if ends_clean else CORRECTOR_ORDER
        order = 0 if i == 0 or (sigma_next == 0 and not evaluate_corrected) else min(left, len(predictions))
        if order == 0:
            x = predicted
        else:
            x = _advanced(x, sigmas[i - 1 : i + 1], lambdas[i - 1 : i + 1], lambdas[: i + 1], predictions, order, tau)
            x = x + noise
            if evaluate_corrected:
                denoised = yield Denoise(x, sigma, i, evaluation=1)
                predictions[-1] = denoised
        if sigma_next == 0:
            return denoised
        tau = float(lowest <= float(sigma_next) <= highest)
        order = min(PREDICTOR_ORDER, len(predictions), left - 1 if ends_clean else PREDICTOR_ORDER)
        step = slice(i, i + 2)
        predicted = _advanced(x, sigmas[step], lambdas[step], lambdas[: i + 1], predictions, order, tau)
        noise = torch.zeros_like(x)
        if tau:
            deviation = sigma_next * torch.sqrt(-torch.expm1(-2 * tau**2 * lambdas[step].diff()[0]))
            noise = deviation * context.noise(sigma, sigma_next)
        predicted = predicted + noise
    return predicted


def _advanced(
    x: Tensor, sigmas: Tensor, lambdas: Tensor, known: Tensor, predictions: list[Tensor], order: int, tau: float
) -> Tensor:
    """x after a step between two levels, without its noise: from the last `order` of `predictions`, made at `known`."""
    h = lambdas[1] - lambdas[0]
    moved = sigmas[1] / sigmas[0] * torch.exp(-(tau**2) * h) * x
    alpha = sigmas[1] * lambdas[1].exp()
    for weight, prediction in zip(_weights(known[-order:], lambdas, tau), predictions[-order:], strict=True):
        moved = moved + alpha * weight * prediction
    return moved


def _weights(nodes: Tensor, lambdas: Tensor, tau: float) -> Tensor:
    """Of the predictions at `nodes`: integrals of Lagrange's polynomials against the SDE's weight over a step.

    The integrals of the powers come by parts, each from the one before; a Vandermonde system makes them those of the
    polynomials (the paper's equations 15 and 18).
    """
    start, end = lambdas
    rate = 1 + tau**2
    decay = torch.exp(-rate * (end - start))
    integrals: list[Tensor] = []
    for power in range(len(nodes)):
        value = end**power - start**power * decay
        integrals.append(value - power / rate * integrals[-1] if power else value)
    powers = torch.vander(nodes, increasing=True).T
    return torch.linalg.solve(powers, torch.stack(integrals))
