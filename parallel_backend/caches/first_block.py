"""First-block cache: where the first block changes its tokens nearly as it did before, the others are not computed.

After ParaAttention's first-block cache. The change that the first block makes (its residual) is compared with the one
of the last evaluation that was computed whole; below a threshold, what the other blocks added then is added again.
With `order` 1 or 2 it is extrapolated from the last evaluations instead (TaylorSeer, arXiv 2503.06923, for the
residual of all blocks together).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import inf, prod

import torch
from torch import Tensor

from ..distributed.axis import Axis
from ..families.state import Evaluation, State
from .policy import COMPUTE_ALL, BlockPolicy

Streams = dict[str, Tensor]


@dataclass
class _Kept:
    """Of one prompt of a run: what the last evaluations that were computed whole have left, the newest last.

    `first`: the first block's residual; `others`: the number of the evaluation, and the residual of the other blocks;
    `evaluations`: how many there were; `skipped`: how many of the last were not whole.
    """

    first: Tensor | None = None
    others: list[tuple[int, Streams]] = field(default_factory=list)
    evaluations: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Agreement:
    """The ranks that must decide alike.

    `tokens`: those that share the tokens of a prediction, whose changes are added up. `voters`: other axes whose ranks
    compute all or none of the blocks together: tensor-parallel ranks, and all that gather sharded weights.
    """

    tokens: Axis
    voters: Sequence[Axis] = ()


class FirstBlockCache:
    """Of one run, or of one part of it with the same weights. `blocks`: how many the model has.

    `stream`: whose change is looked at, the one with the picture's tokens. `threshold`: of the relative change, mean
    |r - r'| / mean |r'|, of the picture of a batch that changes most. `max_skips`: in a row, 0 for any number.
    `levels`: the noise levels from which and down to which it works; `at` says where the run is.
    `whole`, `all`: how many evaluations were computed whole, of how many.
    """

    def __init__(
        self,
        blocks: int,
        stream: str,
        agreement: Agreement,
        *,
        threshold: float,
        max_skips: int = 0,
        order: int = 0,
        levels: tuple[float, float] = (inf, -inf),
    ) -> None:
        self.blocks = blocks
        self.stream = stream
        self.threshold = threshold
        self.max_skips = max_skips
        self.order = order
        self.levels = levels
        self._is_active = True
        self.whole = self.all = 0
        self._agreement = agreement
        self._kept: dict[Hashable, _Kept] = {}

    def at(self, sigma: float) -> None:
        """The next evaluations are at the noise level `sigma`."""
        start, end = self.levels
        self._is_active = start >= sigma >= end

    def policy(self, evaluation: Evaluation) -> BlockPolicy:
        """The policy of this evaluation; one that computes all blocks while the cache is not active."""
        self.all += 1
        if not self._is_active or self.blocks < 2:
            self.whole += 1
            return COMPUTE_ALL
        # A prompt may be evaluated for areas of several sizes.
        prompt = evaluation.condition.name, evaluation.batch, *evaluation.grids.items()
        return _FirstBlockPolicy(self, self._kept.setdefault(prompt, _Kept()))

    def may_skip(self, first: Tensor, kept: _Kept) -> bool:
        """Whether all ranks may add what was kept, after a first block with the residual `first` `[B, S, h]`.

        A collective of the ranks that must decide alike.
        """
        if not kept.others or (self.max_skips and kept.skipped >= self.max_skips):
            against = first.new_ones(1, dtype=torch.float32)
        else:
            assert kept.first is not None
            sums = [each.abs().float().sum((1, 2)) for each in (first - kept.first, kept.first)]
            change, size = self._agreement.tokens.all_reduce(torch.stack(sums))
            # Not `change / size`: a first block that changes nothing has no size.
            against = (change >= self.threshold * size).any().float().reshape(1)
        for axis in self._agreement.voters:
            against = axis.all_reduce(against)
        return not bool(against)

    def remaining(self, kept: _Kept) -> Streams:
        """What the blocks behind the first add now, by the polynomial through what they added before."""
        now = kept.evaluations
        total: Streams = {}
        for own, residual in kept.others:
            weight = prod((now - other) / (own - other) for other, _ in kept.others if other != own)
            for name, tensor in residual.items():
                total[name] = total[name] + weight * tensor if name in total else weight * tensor
        return total


class _FirstBlockPolicy:
    """Of one evaluation."""

    def __init__(self, cache: FirstBlockCache, kept: _Kept) -> None:
        self._cache = cache
        self._kept = kept
        self._skips = False
        self._first: Tensor
        self._behind_first: State
        self._last: State
        self._added: Streams = {}
        """What controls have added between blocks, which is no block's doing, and is added anew in every evaluation."""

    def before(self, block: int, state: State) -> State | None:
        if block == 0:
            return None
        if block == 1:
            self._behind_first = state
        elif not self._skips and state is not self._last:
            for name, tensor in state.streams.items():
                added = tensor - self._last[name]
                self._added[name] = self._added[name] + added if name in self._added else added
        if not self._skips:
            return None
        if block > 1:
            return state
        remaining = self._cache.remaining(self._kept)
        self._kept.evaluations += 1
        return state.with_streams(**{name: state[name] + more for name, more in remaining.items()})

    def after(self, block: int, before: State, after: State) -> None:
        cache, kept, stream = self._cache, self._kept, self._cache.stream
        self._last = after
        if block == 0:
            self._first = after[stream] - before[stream]
            self._skips = cache.may_skip(self._first, kept)
            kept.skipped = kept.skipped + 1 if self._skips else 0
            cache.whole += not self._skips
        elif block == cache.blocks - 1:
            kept.first = self._first
            base = self._behind_first
            remaining = {
                name: tensor - base[name] - self._added[name] if name in self._added else tensor - base[name]
                for name, tensor in after.streams.items()
            }
            kept.others = [*kept.others, (kept.evaluations, remaining)][-1 - cache.order :]
            kept.evaluations += 1
