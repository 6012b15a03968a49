"""Attention over keys and values that other ranks computed one step ago (DistriFusion, arXiv 2402.19481, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed.axis import Axis, Exchange
from .halo import edges_of, gathered, with_halo
from .site import KeySet, KeysValues, Sent, SiteId, Streams, Sum
from .usp import AttentionCore

Place = tuple[int, SiteId, int]
"""A condition, a site, and the number of one of the site's key sets."""


@dataclass
class KeptKeys:
    """A site's buffers for one condition: keys and values `[2, B, h, S, D]` of all tokens, and those under way.

    `coming` brings keys and values of the ranks `sources`, one after the other.
    """

    whole: Tensor
    coming: Exchange | None = None
    sources: Sequence[int] = ()


@dataclass
class KeptParts:
    """A site's buffers for one condition: the part `[N, …]` of each of the N ranks, and those under way."""

    parts: Tensor
    coming: Exchange | None = None


class StaleAttention:
    """Own keys and values are fresh; those of the other ranks of `axis` are from the evaluation before.

    They are on their way from a site until the same site of the next evaluation, behind everything between. Tokens
    are shared out over `axis` first, then over the ring and Ulysses ranks of `core`.
    """

    keeps = True

    def __init__(self, core: AttentionCore, axis: Axis, *, in_turn: bool) -> None:
        """`in_turn`: one rank's keys and values are sent each evaluation, each rank's in its turn, not all ranks'."""
        self._core = core
        self._axis = axis
        self._in_turn = in_turn
        self._kept: dict[Place, KeptKeys] = {}
        self._parts_of_sites: dict[tuple[int, SiteId], KeptParts] = {}
        self._lengths: Mapping[str, Sequence[int]] = {}
        self._condition = self._evaluation = 0
        self._is_synchronous = True

    def begin(self, condition: int, evaluation: int, *, synchronous: bool) -> None:
        """What comes next through the blocks: that `evaluation` of that `condition`.

        `synchronous`: wait for the keys and values of this very evaluation, as the first one must. Exact.
        """
        self._condition, self._evaluation = condition, evaluation
        self._is_synchronous = synchronous

    def finish(self) -> None:
        """Wait for what is under way, and free what is kept."""
        for kept in (*self._kept.values(), *self._parts_of_sites.values()):
            if kept.coming:
                kept.coming.wait()
        self.forget()

    def forget(self) -> None:
        """Free what is kept."""
        self._kept.clear()
        self._parts_of_sites.clear()

    def set_lengths(self, lengths: Mapping[str, Sequence[int]]) -> None:
        """Sets what `Attention.set_lengths` sets, over the ranks of `axis` too: they change slowest."""
        self._lengths = lengths
        inner = self._core.ulysses.size * self._core.ring.size
        own = slice(self._axis.rank * inner, (self._axis.rank + 1) * inner)
        self._core.set_lengths({name: each[own] for name, each in lengths.items()})

    def send(self, x: Tensor, streams: Streams, serves: Sequence[int] | None = None) -> Sent:
        return self._core.send(x, streams, serves)

    def __call__(self, site: SiteId, q: Sent, *sets: KeySet, extra_kv: KeysValues | None = None) -> Tensor:
        """Attention of this rank's queries over the newest received keys and values of all tokens, `[B, S, H, D]`."""
        core = self._core
        own_sets = []
        for number, each in enumerate(sets):
            values = each.value.wait()
            own = torch.stack((each.key.wait(), values))
            parts = [self._parts(each.key.streams, ring) for ring in range(core.ring.size)]
            chunks = [sum(part) for part in parts]
            place = (self._condition, site, number)
            if place not in self._kept:
                length = chunks[core.ring.rank]
                self._kept[place] = KeptKeys(own.new_empty((*own.shape[:3], length, own.shape[4])))
            kept = self._kept[place]
            places = kept.whole.split(parts[core.ring.rank], dim=3)
            places[self._axis.rank].copy_(own)
            self._take_in(kept, places)
            self._start(kept, own, places)
            if self._is_synchronous:
                self._take_in(kept, places)
            own_sets.append(core.own_keys(each, kept.whole, chunks))
        return core.gather(core.attend(q.wait(), own_sets, extra_kv), q)

    def local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._core.local(q, k, v)

    def total(self, site: SiteId, stream: str, of: Sum) -> Tensor:
        """The sum over this rank's tokens as they are, and over others' as they were in the evaluation before."""
        return self._with_late_parts(site, self._core.total(site, stream, of)).sum(dim=0)

    def halo(self, site: SiteId, stream: str, x: Tensor, row: int) -> list[Tensor]:
        """The neighbours within `core` are fresh, those beyond are from the evaluation before."""
        core = self._core
        own = gathered(edges_of([x], row), (core.ulysses, core.ring))[:, 0]
        edges = self._with_late_parts(site, own.contiguous()).flatten(0, 1)
        rank = self._axis.rank * len(own) + core.ring.rank * core.ulysses.size + core.ulysses.rank
        return [with_halo(x, rank, edges, self._lengths[stream])]

    def _with_late_parts(self, site: SiteId, own: Tensor) -> Tensor:
        """`[N, …]`: this rank's part `own` as it is, and those of the others of `axis` as they were."""
        place = (self._condition, site)
        if place not in self._parts_of_sites:
            self._parts_of_sites[place] = KeptParts(own.new_zeros((self._axis.size, *own.shape)))
        kept = self._parts_of_sites[place]
        self._take_in_parts(kept)
        kept.parts[self._axis.rank] = own
        gathering = own.new_empty(self._axis.size * own.numel())
        kept.coming = self._axis.start_all_gather(own.flatten(), gathering)
        if self._is_synchronous:
            self._take_in_parts(kept)
        return kept.parts

    def _take_in_parts(self, kept: KeptParts) -> None:
        if kept.coming is not None:
            kept.parts.copy_(kept.coming.wait().view(kept.parts.shape))
        kept.coming = None

    def _parts(self, streams: Streams, ring: int) -> list[int]:
        """How many of the tokens of the ring rank `ring` each rank of `axis` computes."""
        lengths = [sum(each) for each in zip(*(self._lengths[name] for name in streams), strict=True)]
        ulysses, rings = self._core.ulysses.size, self._core.ring.size
        chunks = [sum(lengths[start : start + ulysses]) for start in range(0, len(lengths), ulysses)]
        return chunks[ring::rings]

    def _start(self, kept: KeptKeys, own: Tensor, places: Sequence[Tensor]) -> None:
        """Send own keys and values, and receive those of others."""
        flat = own.view(-1)
        if self._in_turn and not self._is_synchronous:
            source = self._evaluation % self._axis.size
            if source != self._axis.rank:
                flat = own.new_empty(places[source].numel())
            kept.coming, kept.sources = self._axis.start_broadcast(flat, source), [source]
        else:
            # Every rank sends as much as the one that holds the most tokens.
            widest = max(place.numel() for place in places)
            flat = F.pad(flat, (0, widest - flat.numel()))
            gathered = own.new_empty(self._axis.size * widest)
            kept.coming, kept.sources = self._axis.start_all_gather(flat, gathered), range(self._axis.size)

    def _take_in(self, kept: KeptKeys, places: Sequence[Tensor]) -> None:
        """Put the other ranks' keys and values that were under way where they belong."""
        if kept.coming is None:
            return
        received = kept.coming.wait().view(len(kept.sources), -1)
        for source, part in zip(kept.sources, received, strict=True):
            if source != self._axis.rank:
                place = places[source]
                place.copy_(part[: place.numel()].view(place.shape))
        kept.coming = None
