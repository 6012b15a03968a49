"""TeaCache (arXiv 2411.19108): where the first block's input has changed little, no block is computed.

Each evaluation's relative change of the modulated input, since the evaluation before, is rescaled by a polynomial that
estimates the change of the output. The changes are added up; while their sum is below a threshold, what all blocks
added is added again. The polynomials are those of the authors (github.com/ali-vilab/TeaCache, 7c10efc), fitted to
published models; a model without one counts the change itself, until a study has fitted its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..families.state import Evaluation, State
from .residuals import Agreement, Kept, Limits, ResidualCache

PLAIN = (1.0, 0.0)
"""The polynomial of a model that none was fitted to."""


class TeaCache(ResidualCache):
    """`signal`: the modulated input of a state before the first block, `[B, ...]`. `coefficients`: of the polynomial,
    the highest power first. `threshold`: of the sum, for the picture of a batch that has changed most."""

    def __init__(
        self,
        blocks: range,
        signal: Callable[[State], Tensor],
        agreement: Agreement,
        limits: Limits,
        *,
        threshold: float,
        coefficients: Sequence[float] = PLAIN,
    ) -> None:
        super().__init__(blocks, agreement, limits)
        self.signal = signal
        self.threshold = threshold
        self.coefficients = coefficients

    def changed(self, kept: Kept, evaluation: Evaluation, before: State, behind: State) -> Tensor | bool:
        last, kept.seen = kept.seen, self.signal(before)
        if last is None:
            return True
        change, size = self.agreement.change(kept.seen, last)
        kept.distance = kept.distance + rescaled(change / size, self.coefficients)
        # A polynomial may be negative, but a threshold of 0 computes everything.
        return self.threshold == 0 or ~(kept.distance < self.threshold).all()


def rescaled(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The polynomial of `x`, by Horner's rule."""
    total = torch.zeros_like(x)
    for coefficient in coefficients:
        total = total * x + coefficient
    return total
