"""A cache by a schedule: how fast a model's residuals change at each noise level says which evaluations are computed.

A study measures these rates (nodes/study). They differ by model, but hardly by prompt, number of steps and sampler
(arXiv 2411.13588). While their integral since the last evaluation that was computed whole is below a threshold, what
all blocks added is added again. Nothing is compared: ranks need not talk to decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from ..families.state import Evaluation, State
from .residuals import Agreement, Kept, Limits, ResidualCache


class ScheduleCache(ResidualCache):
    """`level`: the normalised noise level of a timestep, from 1 at the start of a run to 0 at its end. `rates`: the
    relative change for a whole unit of it, in as many equal parts of 0..1."""

    def __init__(
        self,
        blocks: range,
        level: Callable[[float], float],
        agreement: Agreement,
        limits: Limits,
        *,
        threshold: float,
        rates: Sequence[float],
    ) -> None:
        super().__init__(blocks, agreement, limits)
        self.level = level
        self.threshold = threshold
        self.rates = rates

    def changed(self, kept: Kept, evaluation: Evaluation, before: State, behind: State) -> bool:
        last, kept.seen = kept.seen, self.level(float(evaluation.timestep.flatten()[0]))
        if last is None:
            return True
        kept.distance += integral(self.rates, *sorted((last, kept.seen)))
        return kept.distance >= self.threshold


def integral(rates: Sequence[float], low: float, high: float) -> float:
    """The integral from `low` to `high`, within 0..1, of a function that has these values in equal parts of 0..1."""
    edges = [part / len(rates) for part in range(len(rates) + 1)]
    return sum(
        rate * max(0.0, min(high, end) - max(low, start))
        for rate, (start, end) in zip(rates, pairwise(edges), strict=True)
    )
