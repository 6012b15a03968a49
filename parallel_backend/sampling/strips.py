"""Sampling a latent in strips of rows, each by a sampler of its own: what the last stage of a pipeline does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .driver import SamplingJob, Start, drive
from .noise import SlicedNoise
from .solver import Denoise, Solver, SolverContext


def questions_of(start: Start, job: SamplingJob) -> list[Denoise]:
    """What the run's sampler will ask, apart from x: known from the start, as its noise levels do not depend on x."""
    questions = []

    def answer(question: Denoise) -> Tensor:
        questions.append(question)
        return question.x

    x = torch.zeros(1, 1, 1, 1)
    context = SolverContext(job.model_sampling, lambda sigma, sigma_next: x)
    drive(start.sampler.function(x, start.sigmas, context), answer)
    return questions


class StripSamplers:
    """One sampler for each strip of the latent, with noise that is drawn for the whole."""

    def __init__(self, start: Start, job: SamplingJob, strips: Sequence[slice]) -> None:
        """`strips`: rows of the latent."""
        self._end_sigma = start.sigmas[-1]
        self._model_sampling = job.model_sampling
        noise = SlicedNoise(start.noise, [(job.part, slice(None), rows) for rows in strips])
        self._held = [start.held.rows(rows) if start.held else None for rows in strips]
        self._solvers: list[Solver] = []
        self._questions: list[Denoise] = []
        self._results: list[Tensor | None] = [None] * len(strips)
        for number, rows in enumerate(strips):
            context = SolverContext(job.model_sampling, noise.part(number))
            solver = start.sampler.function(start.x[:, :, rows], start.sigmas, context)
            self._solvers.append(solver)
            self._questions.append(next(solver))

    def asked(self, strips: Sequence[int]) -> Tensor:
        """The noisy latent of `strips`, as their samplers ask about it: `[B, C, rows, W]`."""
        return torch.cat([self._asked(strip) for strip in strips], dim=2)

    def answer(self, strips: Sequence[int], denoised: Tensor) -> Tensor:
        """Step `strips`; what they were answered, with the area that is held as it was."""
        rows = [self._questions[strip].x.shape[2] for strip in strips]
        parts = []
        for strip, part in zip(strips, denoised.split(rows, dim=2), strict=True):
            held = self._held[strip]
            parts.append(part if held is None else held.after(part))
            try:
                self._questions[strip] = self._solvers[strip].send(parts[-1])
            except StopIteration as end:
                self._results[strip] = end.value
        return torch.cat(parts, dim=2)

    def result(self) -> Tensor:
        """The sampled latent, once every sampler has ended."""
        whole = torch.cat([result for result in self._results if result is not None], dim=2)
        return self._model_sampling.inverse_noise_scaling(self._end_sigma, whole)

    def _asked(self, strip: int) -> Tensor:
        question, held = self._questions[strip], self._held[strip]
        return question.x if held is None else held.before(question.x, question.sigma)
