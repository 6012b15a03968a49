"""What step caches share that add again what blocks added before: of one run, the evaluations of each of its prompts.

All blocks from number `first` on are computed, or none of them. What they add together (their residual) is kept, and
may be extrapolated from several evaluations (TaylorSeer, arXiv 2503.06923, for the residual of all blocks together).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from ..distributed.axis import Axis
from ..families.state import Evaluation, State
from .policy import COMPUTE_ALL, BlockPolicy

Streams = dict[str, Tensor]


@dataclass
class Kept:
    """Of one prompt of a run: what the last evaluations that were computed whole have left, the newest last.

    `residuals`: the number of the evaluation, and the residual of its blocks; `evaluations`: how many there were;
    `skipped`: how many of the last were not whole. `seen`: what the rule keeps of the last evaluation; `compared`: of
    the last one that was whole; `distance`: how far the evaluations since then have gone.
    """

    residuals: list[tuple[int, Streams]] = field(default_factory=list)
    evaluations: int = 0
    skipped: int = 0
    seen: Any = None
    compared: Any = None
    distance: Any = 0.0


@dataclass(frozen=True)
class Agreement:
    """The ranks that must decide alike.

    `tokens`: those that share the tokens of a prediction, whose changes are added up. `voters`: other axes whose ranks
    compute all or none of the blocks together: tensor-parallel ranks, and all that gather sharded weights.
    """

    tokens: Axis
    voters: Sequence[Axis] = ()

    def change(self, now: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """`[B]` each: sum |now - before| and sum |before| of each picture, over all tokens `[B, S, h]` of the ranks."""
        sums = [each.abs().float().flatten(1).sum(1) for each in (now - before, before)]
        change, size = self.tokens.all_reduce(torch.stack(sums))
        return change, size


@dataclass(frozen=True)
class Limits:
    """When a cache works, and how it predicts. `max_skips`: in a row, 0 for any number. `order`: of the polynomial by
    which residuals are extrapolated. `levels`: the noise levels from which and down to which it works."""

    max_skips: int = 0
    order: int = 0
    levels: tuple[float, float] = (inf, -inf)


class ResidualCache(ABC):
    """Of one run, or of one part of it with the same weights. `blocks`: the numbers of those that this rank computes.

    `at` says where the run is. `whole`, `all`: how many evaluations were computed whole, of how many.
    """

    first = 0
    """How many of the blocks are always computed."""

    def __init__(self, blocks: range, agreement: Agreement, limits: Limits) -> None:
        self.blocks = blocks
        self.limits = limits
        self.agreement = agreement
        self.whole = self.all = 0
        self._is_active = True
        self._kept: dict[Hashable, Kept] = {}

    @abstractmethod
    def changed(self, kept: Kept, evaluation: Evaluation, before: State, behind: State) -> Tensor | bool:
        """Whether an evaluation is to be computed whole; it may be a collective of `agreement.tokens`.

        `before`: the state before all blocks; `behind`: behind the blocks that are always computed. It keeps in
        `kept.seen` what later evaluations are compared with.
        """

    def at(self, sigma: float) -> None:
        """The next evaluations are at the noise level `sigma`."""
        start, end = self.limits.levels
        self._is_active = start >= sigma >= end

    def policy(self, evaluation: Evaluation) -> BlockPolicy:
        """The policy of this evaluation; one that computes all blocks while the cache is not active."""
        self.all += 1
        if not self._is_active or len(self.blocks) <= self.first:
            self.whole += 1
            return COMPUTE_ALL
        # A prompt may be evaluated for areas of several sizes.
        prompt = evaluation.condition.name, evaluation.batch, *evaluation.grids.items()
        return _ResidualPolicy(self, evaluation, self._kept.setdefault(prompt, Kept()))

    def may_skip(self, kept: Kept, evaluation: Evaluation, before: State, behind: State) -> bool:
        """Whether all ranks may add what was kept. A collective of the ranks that must decide alike."""
        changed = self.changed(kept, evaluation, before, behind)
        against = torch.as_tensor(changed, dtype=torch.float32, device=next(iter(behind.streams.values())).device)
        if not kept.residuals or (self.limits.max_skips and kept.skipped >= self.limits.max_skips):
            against = torch.ones_like(against)
        for axis in self.agreement.voters:
            against = axis.all_reduce(against.reshape(1))
        skips = not bool(against)
        if not skips:
            kept.compared, kept.distance = kept.seen, 0.0
            self.whole += 1
        kept.skipped = kept.skipped + 1 if skips else 0
        return skips

    def residual(self, kept: Kept) -> Streams:
        """What the blocks add now, by the polynomial through what they added before."""
        now = kept.evaluations
        total: Streams = {}
        for own, residual in kept.residuals:
            weight = prod((now - other) / (own - other) for other, _ in kept.residuals if other != own)
            for name, tensor in residual.items():
                total[name] = total[name] + weight * tensor if name in total else weight * tensor
        return total


class _ResidualPolicy:
    """Of one evaluation."""

    def __init__(self, cache: ResidualCache, evaluation: Evaluation, kept: Kept) -> None:
        self._cache = cache
        self._evaluation = evaluation
        self._kept = kept
        self._skips = False
        self._start: State
        self._base: State
        self._last: State
        self._added: Streams = {}
        """What controls have added between blocks, which is no block's doing, and is added anew in every evaluation."""

    def before(self, block: int, state: State) -> State | None:
        cache, kept = self._cache, self._kept
        if block == cache.blocks.start:
            self._start = self._last = state
        if block < cache.blocks.start + cache.first:
            return None
        if block == cache.blocks.start + cache.first:
            self._base = state
            # What a control has added behind the last block is not compared.
            self._skips = cache.may_skip(kept, self._evaluation, self._start, self._last)
            if not self._skips:
                return None
            residual = cache.residual(kept)
            kept.evaluations += 1
            return state.with_streams(**{name: state[name] + more for name, more in residual.items()})
        if self._skips:
            return state
        if state is not self._last:
            for name, tensor in state.streams.items():
                added = tensor - self._last[name]
                self._added[name] = self._added[name] + added if name in self._added else added
        return None

    def after(self, block: int, before: State, after: State) -> None:
        cache, kept = self._cache, self._kept
        self._last = after
        if block == cache.blocks[-1]:
            base = self._base
            residual = {
                name: tensor - base[name] - self._added[name] if name in self._added else tensor - base[name]
                for name, tensor in after.streams.items()
            }
            kept.residuals = [*kept.residuals, (kept.evaluations, residual)][-1 - cache.limits.order :]
            kept.evaluations += 1
