"""Samplers with memory: each step evaluates the model once and uses what earlier steps saw.

The history lives in the generator, so that one generator per strip of the latent works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .solver import Denoise, Solver, SolverContext, slope, split_variance


def dpmpp_2m(x: Tensor, sigmas: Tensor, context: SolverContext, cfg_pp: bool = False) -> Solver:
    """DPM-Solver++(2M) (Lu et al. 2022b), in lambda = -log sigma for every model; `cfg_pp`: see the module `cfg_pp`."""
    lambdas = -sigmas.log()
    previous = None
    for i in range(len(sigmas) - 1):
        denoised = yield Denoise(x, sigmas[i], i)
        if sigmas[i + 1] == 0:
            return denoised
        clean = context.negative() if cfg_pp else denoised
        h = lambdas[i + 1] - lambdas[i]
        x = denoised + torch.exp(-h) * (x - clean)
        if previous is not None:
            ratio = (lambdas[i] - lambdas[i - 1]) / h
            x = x - torch.expm1(-h) * (denoised - previous) / (2 * ratio)
        previous = clean
    return x


History = Sequence[tuple[Tensor, Tensor]]
"""Newest first: (denoised, the step in lambda that started there)."""

SdeCorrection = Callable[[Tensor, History], Tensor | float]
"""`f(h_eta, history)`: what the earlier predictions add to a first-order step, in units of alpha."""


def _midpoint_correction(h_eta: Tensor, history: History) -> Tensor | float:
    if len(history) < 2:
        return 0.0
    (denoised, h), (previous, h_previous) = history[0], history[1]
    return -0.5 * torch.expm1(-h_eta) * (h / h_previous) * (denoised - previous)


def _second_order_correction(h_eta: Tensor, history: History) -> Tensor | float:
    if len(history) < 2:
        return 0.0
    (denoised, h), (previous, h_previous) = history[0], history[1]
    phi_2 = torch.expm1(-h_eta) / h_eta + 1
    return phi_2 * (h / h_previous) * (denoised - previous)


def _third_order_correction(h_eta: Tensor, history: History) -> Tensor | float:
    if len(history) < 3:
        return _second_order_correction(h_eta, history)
    (denoised, h), (previous, h_1), (oldest, h_2) = history
    ratio_1, ratio_2 = h_1 / h, h_2 / h
    difference_1 = (denoised - previous) / ratio_1
    difference_2 = (previous - oldest) / ratio_2
    curvature = (difference_1 - difference_2) / (ratio_1 + ratio_2)
    phi_2 = torch.expm1(-h_eta) / h_eta + 1
    phi_3 = phi_2 / h_eta - 0.5
    return phi_2 * (difference_1 + curvature * ratio_1) - phi_3 * curvature


def _multistep_sde(x: Tensor, sigmas: Tensor, context: SolverContext, correction: SdeCorrection, eta: float) -> Solver:
    sigmas = context.model_sampling.finite_half_log_snr(sigmas)
    lambdas = context.model_sampling.half_log_snr(sigmas)
    history: list[tuple[Tensor, Tensor]] = []
    for i in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        denoised = yield Denoise(x, sigma, i)
        if sigma_next == 0:
            return denoised
        h = lambdas[i + 1] - lambdas[i]
        h_eta = h * (1 + eta)
        alpha = sigma_next * lambdas[i + 1].exp()
        history = [(denoised, h), *history[:2]]
        x = (
            sigma_next / sigma * torch.exp(-h * eta) * x
            - alpha * torch.expm1(-h_eta) * denoised
            + alpha * correction(h_eta, history)
            + sigma_next * torch.sqrt(-torch.expm1(-2 * h * eta)) * context.noise(sigma, sigma_next)
        )
    return x


def dpmpp_2m_sde(x: Tensor, sigmas: Tensor, context: SolverContext, eta: float = 1.0) -> Solver:
    """DPM-Solver++(2M) for the diffusion SDE, midpoint form (Lu et al. 2022b, appendix)."""
    return _multistep_sde(x, sigmas, context, _midpoint_correction, eta)


def dpmpp_2m_sde_heun(x: Tensor, sigmas: Tensor, context: SolverContext, eta: float = 1.0) -> Solver:
    """DPM-Solver++(2M) for the diffusion SDE, Heun form."""
    return _multistep_sde(x, sigmas, context, _second_order_correction, eta)


def dpmpp_3m_sde(x: Tensor, sigmas: Tensor, context: SolverContext, eta: float = 1.0) -> Solver:
    """DPM-Solver++(3M) for the diffusion SDE (k-diffusion)."""
    return _multistep_sde(x, sigmas, context, _third_order_correction, eta)


def _phi_1(z: Tensor) -> Tensor:
    return torch.expm1(z) / z


def res_multistep(x: Tensor, sigmas: Tensor, context: SolverContext, eta: float = 0.0, cfg_pp: bool = False) -> Solver:
    """Refined exponential solver, second order multistep (Zhang et al. 2023, arXiv 2308.02157)."""
    previous: tuple[Tensor, Tensor] | None = None
    for i in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        denoised = yield Denoise(x, sigma, i)
        if sigma_next == 0:
            return denoised
        clean = context.negative() if cfg_pp else denoised
        down, added = split_variance(sigma, sigma_next, eta)
        if previous is None:
            x = denoised + slope(x, clean, sigma) * down
        else:
            previous_clean, previous_down = previous
            h = sigma.log() - down.log()
            c2 = (previous_down.log() - sigmas[i - 1].log()) / h
            phi_2 = (_phi_1(-h) - 1.0) / -h
            x = torch.exp(-h) * (x + (denoised - clean))
            x = x + h * ((_phi_1(-h) - phi_2 / c2) * clean + phi_2 / c2 * previous_clean)
        if eta > 0:
            x = x + added * context.noise(sigma, sigma_next)
        previous = clean, down
    return x


def gradient_estimation(
    x: Tensor, sigmas: Tensor, context: SolverContext, gamma: float = 2.0, cfg_pp: bool = False
) -> Solver:
    """Euler steps along an extrapolated slope (Permenter and Yuan 2024, arXiv 2306.04848)."""
    previous = None
    for i in range(len(sigmas) - 1):
        denoised = yield Denoise(x, sigmas[i], i)
        if sigmas[i + 1] == 0:
            return denoised
        newest = slope(x, context.negative() if cfg_pp else denoised, sigmas[i])
        x = denoised + newest * sigmas[i + 1]
        if previous is not None:
            x = x + (gamma - 1) * (newest - previous) * (sigmas[i + 1] - sigmas[i])
        previous = newest
    return x


StepWeights = Sequence[Tensor | float]
"""Weights of the newest slope first."""


def _adams(x: Tensor, sigmas: Tensor, weights: Sequence[StepWeights]) -> Solver:
    """A linear multistep method: each step adds weighted slopes of this step and of those before."""
    slopes: list[Tensor] = []
    for i in range(len(sigmas) - 1):
        denoised = yield Denoise(x, sigmas[i], i)
        if sigmas[i + 1] == 0:
            return denoised
        slopes = [slope(x, denoised, sigmas[i]), *slopes[:3]]
        for weight, past in zip(weights[i], slopes, strict=False):
            x = x + weight * past
    return x


ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def ipndm(x: Tensor, sigmas: Tensor, context: SolverContext) -> Solver:
    """Adams-Bashforth weights up to order 4, as if steps were equal (Zhang and Chen 2022, iPNDM)."""
    steps = sigmas.diff()
    return _adams(x, sigmas, [[step * w for w in ADAMS_BASHFORTH[min(i, 3)]] for i, step in enumerate(steps)])


def ipndm_v(x: Tensor, sigmas: Tensor, context: SolverContext) -> Solver:
    """iPNDM with weights for unequal steps, up to order 4, as ComfyUI has them (Zhang and Chen 2022)."""
    return _adams(x, sigmas, [_unequal_weights(sigmas[max(i - 3, 0) : i + 2]) for i in range(len(sigmas) - 1)])


def _unequal_weights(sigmas: Tensor) -> StepWeights:
    """Weights of the step between the last two of `sigmas`: Newton's form of the Adams-Bashforth weights.

    Two of ComfyUI's terms differ from the method's, and are kept: the factor of the second difference of slopes, and
    the last slope's share in the third.
    """
    h, *past = sigmas.diff().flip(0)
    terms: list[tuple[Tensor, StepWeights]] = [(h.new_ones(()), (1.0,))]
    if len(past) > 0:
        terms.append((h / past[0] / 2, (1.0, -1.0)))
    if len(past) > 1:
        two, ratio = past[0] + past[1], past[0] / past[1]
        factor = (1 - h / (3 * (h + past[0])) * (h * (h + past[0])) / (past[0] * two)) / 2
        terms.append((factor, (1.0, -1 - ratio, ratio)))
        if len(past) > 2:
            near, far = h + past[0], h + two
            share = (1 - h / (3 * near)) / 2 + (1 - h / (2 * near)) * h / (6 * far)
            factor = share * (h * near * far) / (past[0] * two * (two + past[2]))
            change = past[0] * two / (past[1] * (past[1] + past[2]))
            later = ratio + change * (1 + past[1] / past[2]), -change * ratio
            terms.append((factor, (1.0, -1 - ratio - change, *later)))
    weights: list[Tensor | float] = [0.0] * len(terms)
    for factor, difference in terms:
        for place, share in enumerate(difference):
            weights[place] = weights[place] + h * factor * share
    return weights


def lms(x: Tensor, sigmas: Tensor, context: SolverContext) -> Solver:
    """Adams-Bashforth steps of order 4 in sigma, for unequal steps (k-diffusion's linear multistep)."""
    return _adams(x, sigmas, [_lagrange_weights(sigmas, i) for i in range(len(sigmas) - 1)])


def _lagrange_weights(sigmas: Tensor, i: int, order: int = 4) -> StepWeights:
    """Integrals over step `i` of Lagrange's polynomials on the last `order` levels, exact by Gauss's rule."""
    levels = sigmas.double()
    nodes = levels[max(i - order + 1, 0) : i + 1].flip(0)
    middle, half = (levels[i] + levels[i + 1]) / 2, (levels[i + 1] - levels[i]) / 2
    points = middle + half * torch.tensor([-1.0, 1.0], dtype=torch.float64) / math.sqrt(3)
    return [float(half * _lagrange(nodes, j, points).sum()) for j in range(len(nodes))]


def deis(x: Tensor, sigmas: Tensor, context: SolverContext) -> Solver:
    """DEIS, tabulated Adams-Bashforth of order 3 in the time of a variance-preserving SDE (Zhang and Chen 2022)."""
    return _adams(x, sigmas, _deis_weights(sigmas))


DEIS_SIGMA_MIN, DEIS_SIGMA_MAX, DEIS_EPSILON = 0.002, 80.0, 1e-3
DEIS_QUADRATURE_POINTS = 10000


def _deis_weights(sigmas: Tensor, order: int = 3) -> list[StepWeights]:
    """Integrals of Lagrange's polynomials against the SDE's weight; rounded where ComfyUI's are, to equal them."""
    low = float(torch.log(torch.tensor(DEIS_SIGMA_MIN) ** 2 + 1))
    high = math.log(DEIS_SIGMA_MAX**2 + 1)
    beta_slope = 2 * (low / DEIS_EPSILON - high) / (DEIS_EPSILON - 1)
    beta_start = high - 0.5 * beta_slope
    times = ((beta_start**2 + 2 * beta_slope * torch.log(sigmas**2 + 1)).sqrt() - beta_start) / beta_slope

    weights: list[StepWeights] = [[sigmas[1] - sigmas[0]]]
    for i in range(1, len(sigmas) - 1):
        nodes = times[max(i - order + 1, 0) : i + 1].flip(0)
        taus = torch.linspace(float(times[i]), float(times[i + 1]), DEIS_QUADRATURE_POINTS)
        alpha = torch.exp(-0.5 * taus**2 * beta_slope - taus * beta_start)
        density = 0.5 * (taus * beta_slope + beta_start) / torch.sqrt(alpha * (1 - alpha))
        width = (times[i + 1] - times[i]) / DEIS_QUADRATURE_POINTS
        weights.append([torch.sum(density * _lagrange(nodes, j, taus)) * width for j in range(len(nodes))])
    return weights


def _lagrange(nodes: Tensor, j: int, at: Tensor) -> Tensor:
    value = torch.ones_like(at)
    for k in range(len(nodes)):
        if k != j:
            value = value * ((at - nodes[k]) / (nodes[j] - nodes[k]))
    return value
