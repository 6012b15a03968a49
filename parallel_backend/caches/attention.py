"""Attention that is shared across steps: a plan says at which noise levels a block's attention is computed anew.

One of the choices of DiTFastAttn (arXiv 2406.08552). A study measures how fast that which each block's attention gives
changes at each noise level; while the change to be expected since it was last computed is below a budget, what it gave
then is taken again. All ranks know that from the noise level alone, so what is shared is neither computed nor sent.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..attention.site import Attention, KeySet, KeysValues, Sent, SiteId, Streams, Sum
from ..families.state import Evaluation, State
from .residuals import Limits
from .schedule import integral


@dataclass
class _Kept:
    """Of one prompt: where its last evaluation was; by block, how far it has gone since its attention was computed, and
    how often it was shared since; by site, what it gave."""

    level: float | None = None
    distances: list[float] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    outputs: dict[SiteId, Tensor] = field(default_factory=dict)


class AttentionCache:
    """Of one run. `level`: as of `ScheduleCache`. `rates`: of each block, in equal parts of the noise levels.

    `budget`: the change up to which attention is shared. Of `limits` the levels and the shares in a row count.
    `whole`, `all`: how many evaluations had all their attention computed, of how many.
    """

    def __init__(
        self, level: Callable[[float], float], limits: Limits, *, budget: float, rates: Sequence[Sequence[float]]
    ) -> None:
        self.level = level
        self.limits = limits
        self.budget = budget
        self.rates = rates
        self.whole = self.all = 0
        self._prompts: dict[Hashable, _Kept] = {}
        self._now = _Kept()
        self._shares: list[bool] = [False] * len(rates)
        self._block: int | None = None
        """The block that is being computed: what attends between blocks, such as a ControlNet, shares nothing."""
        self._is_active = True

    def around(self, attention: Attention) -> SharedAttention:
        """`attention`, which is not asked where its last answer is shared."""
        return SharedAttention(attention, self)

    def at(self, sigma: float) -> None:
        """The next evaluations are at the noise level `sigma`."""
        start, end = self.limits.levels
        self._is_active = start >= sigma >= end

    def policy(self, evaluation: Evaluation) -> AttentionCache:
        """Every block is computed; whether its attention is, is decided here."""
        blocks = range(len(self.rates))
        prompt = evaluation.condition.name, evaluation.batch, *evaluation.grids.items()
        self._now = now = self._prompts.setdefault(prompt, _Kept(None, [0.0] * len(blocks), [0] * len(blocks)))
        last, now.level = now.level, self.level(float(evaluation.timestep.flatten()[0]))
        for block in blocks:
            between = () if last is None else sorted((last, now.level))
            now.distances[block] += integral(self.rates[block], *between) if between else 0.0
            self._shares[block] = (
                self._is_active
                and last is not None
                and now.distances[block] < self.budget
                and (not self.limits.max_skips or now.shared[block] < self.limits.max_skips)
            )
            now.shared[block] = now.shared[block] + 1 if self._shares[block] else 0
            if not self._shares[block]:
                now.distances[block] = 0.0
        self.all += 1
        self.whole += not any(self._shares)
        return self

    def before(self, block: int, state: State) -> State | None:
        self._block = block
        return None

    def after(self, block: int, before: State, after: State) -> None:
        self._block = None

    @property
    def shares(self) -> bool:
        """Whether the attention of the current block is not computed."""
        return self._block is not None and self._shares[self._block]

    def kept(self, site: SiteId) -> Tensor:
        """What the site gave when it was last computed."""
        return self._now.outputs[site]

    def keep(self, site: SiteId, output: Tensor) -> None:
        if self._block is not None:
            self._now.outputs[site] = output


class SharedAttention:
    """See `AttentionCache.around`."""

    def __init__(self, attention: Attention, cache: AttentionCache) -> None:
        self.keeps = attention.keeps
        self._attention = attention
        self._cache = cache

    def set_lengths(self, lengths: Mapping[str, Sequence[int]]) -> None:
        self._attention.set_lengths(lengths)

    def send(self, x: Tensor, streams: Streams, serves: Sequence[int] | None = None) -> Sent:
        """Sends nothing where nobody will attend."""
        return Sent(x, streams, serves=serves) if self._cache.shares else self._attention.send(x, streams, serves)

    def __call__(self, site: SiteId, q: Sent, *sets: KeySet, extra_kv: KeysValues | None = None) -> Tensor:
        if self._cache.shares:
            return self._cache.kept(site)
        output = self._attention(site, q, *sets, extra_kv=extra_kv)
        self._cache.keep(site, output)
        return output

    def local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attention.local(q, k, v)

    def total(self, site: SiteId, stream: str, of: Sum) -> Tensor:
        return self._attention.total(site, stream, of)

    def halo(self, site: SiteId, stream: str, x: Tensor, row: int) -> list[Tensor]:
        return self._attention.halo(site, stream, x, row)
