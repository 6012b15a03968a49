"""First-block cache: where the first block changes its tokens nearly as it did before, the others are not computed.

After ParaAttention's first-block cache. The change that the first block makes (its residual) is compared with the one
of the last evaluation that was computed whole; below a threshold, what the other blocks added is added again.
"""

from __future__ import annotations

from torch import Tensor

from ..families.state import Evaluation, State
from .residuals import Agreement, Kept, Limits, ResidualCache


class FirstBlockCache(ResidualCache):
    """`stream`: whose change is looked at, the one with the picture's tokens. `threshold`: of the relative change, mean
    |r - r'| / mean |r'|, of the picture of a batch that changes most."""

    first = 1

    def __init__(self, blocks: range, stream: str, agreement: Agreement, limits: Limits, *, threshold: float) -> None:
        super().__init__(blocks, agreement, limits)
        self.stream = stream
        self.threshold = threshold

    def changed(self, kept: Kept, evaluation: Evaluation, before: State, behind: State) -> Tensor | bool:
        kept.seen = behind[self.stream] - before[self.stream]
        if kept.compared is None:
            return True
        change, size = self.agreement.change(kept.seen, kept.compared)
        # Not `change / size`: a first block that changes nothing has no size.
        return ~(change < self.threshold * size).all()
