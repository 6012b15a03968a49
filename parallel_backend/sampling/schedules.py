"""The noise levels of a run: ComfyUI's schedulers by name.

All return fp32 `[steps + 1]` on the CPU, descending to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError
from .model_sampling import ModelSampling
from .names import SCHEDULER_NAMES, check_part, unknown
from .samplers import find_sampler

MAX_LEVELS = 1_000_000
"""Of a schedule, so that none takes longer than a moment."""

Scheduler = Callable[[ModelSampling, int], Tensor]


def simple(model_sampling: ModelSampling, steps: int) -> Tensor:
    """Equal strides down the model's table."""
    table = model_sampling.sigmas
    stride = len(table) / steps
    return _ending_at_zero(table[[-(1 + int(i * stride)) for i in range(steps)]])


def ddim_uniform(model_sampling: ModelSampling, steps: int) -> Tensor:
    """Equal whole strides up the model's table; the count may exceed `steps` where they do not divide it."""
    table = model_sampling.sigmas
    starts_at_zero = _is_zero(table[1])
    stride = max(len(table) // (steps + starts_at_zero), 1)
    levels = table[1::stride].flip(0)
    return levels if starts_at_zero else _ending_at_zero(levels)


def normal(model_sampling: ModelSampling, steps: int) -> Tensor:
    """Equal strides in the model's time, both ends included."""
    first, last = _time_range(model_sampling)
    if _is_zero(model_sampling.sigma(last)):
        return _levels_at(model_sampling, torch.linspace(float(first), float(last), steps + 1))
    return _ending_at_zero(_levels_at(model_sampling, torch.linspace(float(first), float(last), steps)))


def sgm_uniform(model_sampling: ModelSampling, steps: int) -> Tensor:
    """Equal strides in the model's time, without the last (Stability's generative models)."""
    first, last = _time_range(model_sampling)
    return _ending_at_zero(_levels_at(model_sampling, torch.linspace(float(first), float(last), steps + 1)[:-1]))


def karras(model_sampling: ModelSampling, steps: int, rho: float = 7.0) -> Tensor:
    """Karras et al. 2022, eq. 5."""
    low, high = (float(s) ** (1 / rho) for s in (model_sampling.sigma_min, model_sampling.sigma_max))
    return _ending_at_zero((high + torch.linspace(0, 1, steps) * (low - high)) ** rho)


def exponential(model_sampling: ModelSampling, steps: int) -> Tensor:
    """Equal strides in log sigma."""
    low, high = (math.log(s) for s in (model_sampling.sigma_min, model_sampling.sigma_max))
    return _ending_at_zero(torch.linspace(high, low, steps).exp())


def beta(model_sampling: ModelSampling, steps: int, alpha: float = 0.6, beta: float = 0.6) -> Tensor:
    """Quantiles of a beta distribution over the model's table, repeated ones once (Lee et al. 2024, 2407.12173)."""
    from scipy.special import betaincinv

    quantiles = 1 - torch.arange(steps, dtype=torch.float64) / steps
    share = torch.from_numpy(betaincinv(alpha, beta, quantiles.numpy()))
    rows = (share * (len(model_sampling.sigmas) - 1)).round().long()
    return _ending_at_zero(model_sampling.sigmas[rows.unique_consecutive()])


def linear_quadratic(model_sampling: ModelSampling, steps: int, threshold: float = 0.025) -> Tensor:
    """Linear to `threshold` over half the steps, then quadratic with the same slope (Genmo, Mochi 1)."""
    linear_steps = steps // 2
    if linear_steps == 0:
        return torch.tensor([1.0, 0.0]) * model_sampling.sigma_max
    quadratic_steps = steps - linear_steps
    rise = linear_steps - threshold * steps
    square = rise / (linear_steps * quadratic_steps**2)
    slope = threshold / linear_steps - 2 * rise / quadratic_steps**2
    constant = square * linear_steps**2
    done = [i * threshold / linear_steps for i in range(linear_steps)]
    done += [square * i**2 + slope * i + constant for i in range(linear_steps, steps)]
    return torch.tensor([1.0 - share for share in done] + [0.0]) * model_sampling.sigma_max


def kl_optimal(model_sampling: ModelSampling, steps: int) -> Tensor:
    """Equal strides in arctan sigma (Sabour et al. 2024, Align Your Steps, theorem 3.1)."""
    low, high = (math.atan(s) for s in (model_sampling.sigma_min, model_sampling.sigma_max))
    share = torch.arange(steps) / (steps - 1) if steps > 1 else torch.zeros(1)
    return _ending_at_zero(torch.tan(share * low + (1 - share) * high))


def _levels_at(model_sampling: ModelSampling, times: Tensor) -> Tensor:
    # One by one: a vectorised exp may differ in the last bit, and Brownian noise is keyed by the exact level.
    return torch.stack([model_sampling.sigma(time) for time in times])


def _ending_at_zero(levels: Tensor) -> Tensor:
    return torch.cat([levels, levels.new_zeros(1)])


def _is_zero(sigma: Tensor) -> bool:
    return math.isclose(float(sigma), 0, abs_tol=1e-5)


def _time_range(model_sampling: ModelSampling) -> tuple[Tensor, Tensor]:
    return model_sampling.timestep(model_sampling.sigma_max), model_sampling.timestep(model_sampling.sigma_min)


SCHEDULERS: dict[str, Scheduler] = {
    scheduler.__name__: scheduler
    for scheduler in (
        simple,
        sgm_uniform,
        karras,
        exponential,
        ddim_uniform,
        beta,
        normal,
        linear_quadratic,
        kl_optimal,
    )
}


def part_of(sigmas: Tensor, start: int, end: int, leftover_noise: bool) -> Tensor:
    """The levels of a run's steps number `start` to `end`, without this last one; fewer than 2 where there are none.

    A part that ends before the run does goes down to zero in its last step, unless `leftover_noise` keeps what noise
    there is at that level, for a run that starts at `end`. Raises `UserError` as `check_part`.
    """
    check_part(start, end)
    if end < len(sigmas) - 1:
        sigmas = sigmas[: end + 1] if leftover_noise else _ending_at_zero(sigmas[:end])
    return sigmas[start:]


def sigmas_for(
    model_sampling: ModelSampling, scheduler: str, steps: int, denoise: float = 1.0, sampler: str = "euler"
) -> Tensor:
    """The levels of a run of `steps` steps, first to last.

    `denoise` below 1 keeps the last `steps + 1` levels of a schedule of `steps / denoise`; at 0 nothing is to be
    done and the result is empty. Raises UserError for an unknown scheduler or sampler and for steps below 1.
    """
    if scheduler not in SCHEDULERS:
        raise unknown("scheduler", scheduler, SCHEDULER_NAMES)
    if steps < 1:
        raise UserError(f"A run needs at least 1 step, not {steps}.", "Set steps to 1 or more.")
    discard = find_sampler(sampler).discard_penultimate_sigma
    if denoise <= 0.0:
        return torch.empty(0)
    whole_run = denoise > 0.9999
    if steps / denoise > MAX_LEVELS:
        raise UserError(
            f"denoise={denoise:g} makes {steps} steps the end of {steps / denoise:g}; at most {MAX_LEVELS} are made.",
            f"Use a denoise of at least {steps / MAX_LEVELS:g}.",
        )
    total = (steps if whole_run else int(steps / denoise)) + discard
    sigmas = SCHEDULERS[scheduler](model_sampling, total)
    if discard:
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    return sigmas if whole_run else sigmas[-(steps + 1) :]
