"""Sampling a latent in strips, each by a sampler of its own: what the last stage of a pipeline does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .driver import SamplingJob, Start, drive
from .noise import SlicedNoise
from .solver import Denoise, Solver, SolverContext


def calls_of(start: Start, job: SamplingJob) -> list[Denoise]:
    """What the run's sampler will ask, apart from x: known from the start, as its noise levels do not depend on x."""
    calls = []

    def note(call: Denoise) -> Tensor:
        calls.append(call)
        return call.x

    x = torch.zeros(1, 1, 1, 1)
    context = SolverContext(job.model_sampling, lambda sigma, sigma_next: x, lambda: x)
    drive(start.sampler.function(x, start.sigmas, context), note)
    return calls


class Strips(Protocol):
    """How a latent is cut into strips."""

    def __len__(self) -> int: ...

    def cut(self, whole: Tensor, patches: Sequence[int], /) -> Tensor:
        """Neighbouring strips of what is like the whole latent."""
        ...

    def join(self, strips: Sequence[Tensor], /) -> Tensor:
        """A single strip, or all of them, as one."""
        ...


class StripSamplers:
    """Runs one sampler for each strip of the latent, with noise that is drawn for the whole."""

    def __init__(self, start: Start, job: SamplingJob, strips: Strips) -> None:
        self._strips = strips
        self._end_sigma = start.sigmas[-1]
        self._model_sampling = job.model_sampling

        def cutter(number: int) -> Callable[[Tensor], Tensor]:
            return lambda whole: strips.cut(whole, [number])

        cutters = [cutter(number) for number in range(len(strips))]
        noise = SlicedNoise(start.noise, [lambda draw, cut=cut: cut(draw[job.part]) for cut in cutters])
        self._negatives: list[Tensor | None] = [None] * len(strips)
        self._held = [start.held.within(cut) if start.held else None for cut in cutters]
        self._solvers: list[Solver] = []
        self._calls: list[Denoise] = []
        self._results: list[Tensor | None] = [None] * len(strips)
        for number, cut in enumerate(cutters):
            context = SolverContext(job.model_sampling, noise.part(number), partial(self._negative, number))
            solver = start.sampler.function(cut(start.x), start.sigmas, context)
            self._solvers.append(solver)
            self._calls.append(next(solver))

    def asked(self, patches: Sequence[int]) -> Tensor:
        """The noisy latent of one strip, or of all, as their samplers ask about it."""
        return self._strips.join([self._asked(strip) for strip in patches])

    def receive(self, patches: Sequence[int], denoised: Tensor, negative: Tensor | None = None) -> Tensor:
        """Steps one strip, or all; returns the denoised strips, with the area that is held as it was.

        `negative`: what the negative prompt alone predicts of them.
        """
        parts = []
        for strip in patches:
            part, self._negatives[strip] = (
                whole if whole is None or len(patches) == 1 else self._strips.cut(whole, [strip])
                for whole in (denoised, negative)
            )
            assert part is not None
            held = self._held[strip]
            parts.append(part if held is None else held.after(part))
            try:
                self._calls[strip] = self._solvers[strip].send(parts[-1])
            except StopIteration as end:
                self._results[strip] = end.value
        return self._strips.join(parts)

    def _negative(self, strip: int) -> Tensor:
        negative = self._negatives[strip]
        assert negative is not None
        return negative

    def result(self) -> Tensor:
        """The sampled latent, once every sampler has ended."""
        whole = self._strips.join([result for result in self._results if result is not None])
        return self._model_sampling.inverse_noise_scaling(self._end_sigma, whole)

    def _asked(self, strip: int) -> Tensor:
        call, held = self._calls[strip], self._held[strip]
        return call.x if held is None else held.before(call.x, call.sigma)
