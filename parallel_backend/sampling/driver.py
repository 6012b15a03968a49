"""The serial driver: runs one sampler over one model, from noise to latent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UserError
from .finite import FiniteCheck, Together
from .model_sampling import ModelSampling
from .noise import NoiseKind, SlicedNoise, mask_noise, noise_source
from .samplers import Sampler, find_sampler
from .solver import Denoise, NoiseSource, Solver, SolverContext, no_negative


@dataclass(frozen=True)
class StepContext:
    """The place of a model call in the run; `evaluation` counts the calls of one step."""

    index: int
    total: int
    evaluation: int


Model = Callable[[Tensor, Tensor, StepContext], Tensor]
"""`model(x, sigma, step) -> denoised`; x fp32 `[B, C, ...]`, sigma 0-d on the CPU; guidance included."""

OnStep = Callable[[int, int, Tensor, Tensor, Tensor], None]
"""`on_step(step, total, denoised, x, sigma)`, once a step, as soon as its first prediction is there."""


@dataclass(frozen=True)
class SamplingJob:
    """One run. `latent` is in the model's space (scaled and shifted; an empty latent stays zero).

    `noise`, `latent`: `[B, C, ...]` on the device where sampling takes place. `sigmas`: `[steps + 1]`.
    `mask`: broadcastable to the latent, 1 where the latent is to change, 0 where it is to stay.
    `noise_source`: what a stochastic sampler draws from; by default ComfyUI's for the seed.
    `part`: which pictures of the batch to sample (data parallel); their noise is that of the whole batch's run.
    """

    sampler: str
    model_sampling: ModelSampling
    sigmas: Tensor
    noise: Tensor
    latent: Tensor
    seed: int
    mask: Tensor | None = None
    noise_source: NoiseSource | None = None
    part: slice = field(default_factory=lambda: slice(None))


def run(
    model: Model,
    job: SamplingJob,
    on_step: OnStep | None = None,
    negative: Callable[[], Tensor] = no_negative,
    together: Together = lambda noted: noted,
) -> Tensor:
    """Samples and returns the latent of the job's `part`, fp32, in the model's space: `check_result` is for the whole.

    `negative()`: what the negative prompt alone predicts in the newest call of the model, for the samplers of CFG++.

    `together`: over ranks that sample other pictures of the batch, so that all raise in the same call.

    Raises UserError for an unknown sampler, too few steps, sigmas that do not descend, tensors that do not fit, or a
    prediction that is not finite.
    """
    check_shapes(job)
    if len(job.sigmas) < 2:
        return job.latent.float()[job.part]
    start = prepare(job)
    held, sigmas, total = start.held, start.sigmas, start.total
    noise = SlicedNoise(start.noise, [lambda draw: draw[job.part]]).part(0)
    check = FiniteCheck(total, together)
    solver = start.sampler.function(start.x, sigmas, SolverContext(job.model_sampling, noise, negative))

    def predict(call: Denoise) -> Tensor:
        step = StepContext(call.step, total, call.evaluation)
        x = call.x if held is None else held.before(call.x, call.sigma)
        denoised = model(x, call.sigma, step).float()
        check.note(denoised, call)
        denoised = denoised if held is None else held.after(denoised)
        if on_step is not None and call.evaluation == 0:
            on_step(call.step, total, denoised, call.x, call.sigma)
        return denoised

    sampled = drive(solver, predict)
    check.finish()
    return job.model_sampling.inverse_noise_scaling(sigmas[-1], sampled)


@dataclass(frozen=True)
class Start:
    """A run before its first call: the part's `x` at `sigmas[0]`, what is held of it, the whole's `noise`."""

    sampler: Sampler
    sigmas: Tensor
    x: Tensor
    held: HeldArea | None
    noise: NoiseSource

    @property
    def total(self) -> int:
        """The number of steps."""
        return len(self.sigmas) - 1


def prepare(job: SamplingJob) -> Start:
    """Raises UserError for an unknown sampler, too few steps, or sigmas that do not descend."""
    sampler = find_sampler(job.sampler)
    latent, noise = job.latent.float(), job.noise.float()
    sigmas = sampler.end_levels(check_sigmas(job.sigmas))
    if sampler.noise in (NoiseKind.BROWNIAN, NoiseKind.DEVICE_BROWNIAN):
        check_log_snr(sampler, sigmas, job.model_sampling)
    held = None
    if job.mask is not None:
        mask_fill = mask_noise(noise.shape, job.seed).to(noise) if sampler.fresh_mask_noise else noise
        mask = job.mask.to(latent).expand_as(latent)
        held = HeldArea(mask[job.part], latent[job.part], mask_fill[job.part], job.model_sampling)

    from_noise = job.model_sampling.starts_from_pure_noise(sigmas[0])
    x = job.model_sampling.noise_scaling(sigmas[0], noise, latent, from_noise)
    source = job.noise_source or noise_source(sampler.noise, x, job.seed, sigmas)
    return Start(sampler, sigmas, x[job.part], held, source)


def drive(solver: Solver, predict: Callable[[Denoise], Tensor]) -> Tensor:
    """Serves the calls of a sampler until it returns its x."""
    try:
        call = next(solver)
        while True:
            call = solver.send(predict(call))
    except StopIteration as end:
        return end.value


@dataclass(frozen=True)
class HeldArea:
    """Keeps the latent outside `mask` as it was: noised to the current level on the way in, clean on the way out."""

    mask: Tensor
    latent: Tensor
    noise: Tensor
    model_sampling: ModelSampling

    def within(self, cut: Callable[[Tensor], Tensor]) -> HeldArea:
        """What is held of the strip that `cut` cuts out of the latent."""
        return HeldArea(cut(self.mask), cut(self.latent), cut(self.noise), self.model_sampling)

    def before(self, x: Tensor, sigma: Tensor) -> Tensor:
        kept = self.model_sampling.noise_scaling(sigma, self.noise, self.latent)
        return x * self.mask + kept * (1.0 - self.mask)

    def after(self, denoised: Tensor) -> Tensor:
        return denoised * self.mask + self.latent * (1.0 - self.mask)


def latent_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """A LATENT's `noise_mask` (`[H, W]`, `[B, H, W]` or `[B, 1, H, W]`, any size) as `[B, C, ...]` for `shape`.

    For a video latent `[B, C, T, H, W]` the mask's first dim counts frames, unless it has five dims itself. Raises
    UserError for a mask that is empty, has fewer dims, or holds what is no number.
    """
    mask = mask.float()
    if mask.ndim < 2 or not mask.numel() or not torch.isfinite(mask).all():
        raise UserError(
            f"The latent's noise_mask of the shape {list(mask.shape)} is no picture of finite numbers.",
            "Look at the node that made it.",
        )
    if len(shape) == 5:
        mask = mask if mask.ndim == 5 else mask.reshape(1, 1, -1, *mask.shape[-2:])
        mask = functional.interpolate(mask, size=shape[2:], mode="trilinear")
    else:
        mask = functional.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]), size=shape[2:], mode="bilinear")
    if mask.shape[1] < shape[1]:
        mask = mask.repeat(1, shape[1], *[1] * (mask.ndim - 2))[:, : shape[1]]
    repeats = -(-shape[0] // mask.shape[0])
    return mask.repeat(repeats, *[1] * (mask.ndim - 1))[: shape[0]]


def check_shapes(job: SamplingJob) -> None:
    if job.noise.shape != job.latent.shape:
        raise UserError(
            f"The noise has the shape {list(job.noise.shape)}, the latent {list(job.latent.shape)}.",
            "Draw the noise for the latent that is sampled.",
        )
    if job.latent.numel() == 0:
        raise UserError(
            f"The latent is empty: its shape is {list(job.latent.shape)}.",
            "Give a batch, a width and a height of at least 1.",
        )


SHOWN_LEVELS = 3
"""How many an error shows before and from the first that is wrong."""


def check_sigmas(sigmas: Tensor) -> Tensor:
    """The levels as fp32 on the CPU."""
    sigmas = sigmas.detach().float().cpu()
    is_wrong = ~torch.isfinite(sigmas) | (sigmas < 0)
    is_wrong[1:] |= sigmas.diff() >= 0
    if is_wrong.any():
        place = int(is_wrong.nonzero()[0])
        first, last = max(0, place - SHOWN_LEVELS), min(len(sigmas), place + SHOWN_LEVELS)
        shown = ", ".join(f"{round(float(level), 6)}" for level in sigmas[first:last])
        raise UserError(
            f"The sigmas do not fall from step to step: {'… ' * (first > 0)}{shown}{' …' * (last < len(sigmas))}, "
            f"wrong at number {place} of {len(sigmas) - 1}.",
            "Every level must be finite, at least 0, and lower than the one before; use fewer steps or another "
            "scheduler.",
        )
    return sigmas


def check_log_snr(sampler: Sampler, sigmas: Tensor, model_sampling: ModelSampling) -> None:
    """Raises UserError for levels that are more than noise alone: asked for a level that is no number, a Brownian path
    looks for it without end."""
    lambdas = model_sampling.half_log_snr(model_sampling.finite_half_log_snr(sigmas))
    if not (lambdas > -torch.inf).all():
        raise UserError(
            f"The sampler {sampler.name} steps in the logarithm of signal over noise, of which there is none at these "
            f"sigmas of this model: {[round(float(s), 6) for s in sigmas]}.",
            "Take sigmas that are made for this model (of a flow all but the first are below 1), or the sampler euler.",
        )
