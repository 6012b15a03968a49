"""Attention over the keys and values of a whole picture, while one patch of its tokens is computed (PipeFusion)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..tokens.plan import Patches, TokenPlan
from .halo import edges_of, gathered, with_halo
from .site import KeySet, KeysValues, Sent, SiteId, Streams, Sum
from .usp import AttentionCore

Place = tuple[int, SiteId, int]
"""The number of a condition, a site, and the number of one of the site's key sets."""


class PatchAttention:
    """The attention of one stage's blocks. Each site keeps the keys and values of all tokens, the newest it has seen.

    They are kept as they are after the Ulysses all-to-all: this rank's heads of the tokens of its ring chunk, rank by
    rank, stream by stream, patch by patch. A ring passes them on whole, so that each patch costs the hops that a whole
    picture costs without PipeFusion.
    """

    keeps = True

    def __init__(self, core: AttentionCore, plans: Sequence[TokenPlan]) -> None:
        """`plans`: one for each condition that is evaluated here."""
        self._core = core
        self._plans = plans
        self._kept: dict[Place, Tensor] = {}
        self._sums: dict[tuple[int, SiteId], dict[int, Tensor]] = {}
        self._edges: dict[tuple[int, SiteId], dict[int, Tensor]] = {}
        self._condition = 0
        self._patches: Patches = ()
        self._seen: Patches = ()

    def begin(self, condition: int, patches: Patches, *, seen: int) -> None:
        """What comes next through the blocks: the tokens of `patches`, under the condition of that number.

        `seen`: how many patches, from the first on, have keys and values by then.
        """
        self._condition, self._patches, self._seen = condition, patches, range(seen)
        self.set_lengths(self._plans[condition].lengths(patches))

    def plan(self, condition: int) -> TokenPlan:
        """The token plan of the condition with this number."""
        return self._plans[condition]

    def forget(self) -> None:
        """Free what is kept."""
        self._kept.clear()
        self._sums.clear()
        self._edges.clear()

    def set_lengths(self, lengths: Mapping[str, Sequence[int]]) -> None:
        self._core.set_lengths(lengths)

    def send(self, x: Tensor, streams: Streams, serves: Sequence[int] | None = None) -> Sent:
        return self._core.send(x, streams, serves)

    def __call__(self, site: SiteId, q: Sent, *sets: KeySet, extra_kv: KeysValues | None = None) -> Tensor:
        """Attention of this rank's queries over the newest keys and values of all tokens, `[B, S, H, D]`."""
        core, own = self._core, []
        for number, each in enumerate(sets):
            values = each.value.wait()
            keys_values = (each.key.wait(), values)
            streams = each.key.streams
            place = (self._condition, site, number)
            if place not in self._kept:
                length = self._chunks(streams, self._plan.patches)[core.ring.rank]
                like = keys_values[0]
                self._kept[place] = like.new_zeros((2, *like.shape[:2], length, like.shape[3]))
            kept = self._kept[place]
            self._keep(kept, keys_values, streams)
            own.append(core.own_keys(each, self._begun(kept, streams), self._chunks(streams, self._seen)))
        return core.gather(core.attend(q.wait(), own, extra_kv), q)

    def local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._core.local(q, k, v)

    def total(self, site: SiteId, stream: str, of: Sum) -> Tensor:
        """The sum over the newest of all patches."""
        sizes, rank = self._plan.sizes[stream], self._rank
        parts, start = [], 0
        for patch in self._patches:
            stop = start + sizes[patch][rank]
            parts.append(of(slice(start, stop)))
            start = stop
        kept = self._sums.setdefault((self._condition, site), {})
        kept.update(zip(self._patches, self._core.reduce(torch.stack(parts)), strict=True))
        return torch.stack([kept[patch] for patch in self._seen]).sum(dim=0)

    def halo(self, site: SiteId, stream: str, x: Tensor, row: int) -> list[Tensor]:
        """The neighbours are the newest of all patches; where none were seen yet, zeros."""
        core, sizes = self._core, self._plan.sizes[stream]
        runs = x.split([sizes[patch][self._rank] for patch in self._patches], dim=1)
        fresh = gathered(edges_of(runs, row), (core.ulysses, core.ring))
        kept = self._edges.setdefault((self._condition, site), {})
        kept.update({patch: fresh[:, number] for number, patch in enumerate(self._patches)})
        ranks = self._plan.ranks
        edges = [kept[patch][rank] for patch in self._seen for rank in range(ranks)]
        held = [sizes[patch][rank] for patch in self._seen for rank in range(ranks)]
        return [
            with_halo(run, patch * ranks + self._rank, edges, held)
            for patch, run in zip(self._patches, runs, strict=True)
        ]

    @property
    def _plan(self) -> TokenPlan:
        return self._plans[self._condition]

    @property
    def _rank(self) -> int:
        return self._core.ring.rank * self._core.ulysses.size + self._core.ulysses.rank

    def _chunks(self, streams: Streams, patches: Patches) -> list[int]:
        """The lengths of the chunks that the ranks of the ring hold of `patches`."""
        ulysses, plan = self._core.ulysses.size, self._plan
        return [
            sum(plan.size(name, rank, patches) for name in streams for rank in range(first, first + ulysses))
            for first in range(0, self._core.ring.size * ulysses, ulysses)
        ]

    def _runs(self, streams: Streams, patches: Patches) -> Iterator[tuple[int, int]]:
        """Yields, for each rank of the chunk and each stream, where its tokens of `patches` begin in the kept keys and
        values, and how many they are."""
        plan, first = self._plan, self._core.ring.rank * self._core.ulysses.size
        start = 0
        for rank in range(first, first + self._core.ulysses.size):
            for name in streams:
                before = plan.size(name, rank, range(patches[0]))
                yield start + before, plan.size(name, rank, patches)
                start += plan.size(name, rank, plan.patches)

    def _begun(self, kept: Tensor, streams: Streams) -> Tensor:
        """The filled part of `kept`: the patches computed so far."""
        if len(self._seen) == len(self._plan.patches):
            return kept
        runs = self._runs(streams, self._seen)
        return torch.cat([kept[:, :, :, start : start + count] for start, count in runs], dim=3)

    def _keep(self, kept: Tensor, keys_values: Sequence[Tensor], streams: Streams) -> None:
        """Writes the keys and values of the current patches to their places."""
        source = 0
        for start, count in self._runs(streams, self._patches):
            for whole, fresh in zip(kept, keys_values, strict=True):
                whole[:, :, start : start + count] = fresh[:, :, source : source + count]
            source += count
