"""Attention over keys and values that other ranks computed one step ago (DistriFusion, arXiv 2402.19481, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed.axis import Axis, Exchange
from ..tokens.plan import Tokens, lengths_by_tokens
from .site import KeysValues, Sent
from .usp import AttentionCore


@dataclass
class Kept:
    """What one site keeps for one condition: keys and values `[2, B, h, S, D]` of all tokens, and what is under way.

    `coming` brings keys and values of the ranks `sources`, one after the other.
    """

    whole: Tensor
    coming: Exchange | None = None
    sources: Sequence[int] = ()


class StaleAttention:
    """Own keys and values are fresh; those of the other ranks of `axis` are from the evaluation before.

    They are on their way from this site until the same site of the next evaluation, behind everything between. Tokens
    are shared out over `axis` first, then over the ring and Ulysses ranks of `core`.
    """

    keeps = True

    def __init__(self, core: AttentionCore, axis: Axis, *, in_turn: bool) -> None:
        """`in_turn`: one rank's keys and values are sent each evaluation, each rank's in its turn, not all ranks'."""
        self._core = core
        self._axis = axis
        self._in_turn = in_turn
        self._kept: dict[tuple[int, int], Kept] = {}
        self._lengths: dict[Tokens, list[int]] = {}
        self._condition = self._site = self._evaluation = 0
        self._is_synchronous = True

    def begin(self, condition: int, evaluation: int, *, synchronous: bool) -> None:
        """What comes next through the blocks: that `evaluation` of that `condition`.

        `synchronous`: wait for the keys and values of this very evaluation, as the first one must. Exact.
        """
        self._condition, self._evaluation, self._site = condition, evaluation, 0
        self._is_synchronous = synchronous

    def finish(self) -> None:
        """Wait for what is under way, and free what is kept."""
        for kept in self._kept.values():
            if kept.coming:
                kept.coming.wait()
        self.forget()

    def forget(self) -> None:
        """Free what is kept."""
        self._kept.clear()

    def set_lengths(self, text: Sequence[int], image: Sequence[int]) -> None:
        """As `Attention.set_lengths`, over the ranks of `axis` too: they change slowest."""
        self._lengths = lengths_by_tokens(text, image)
        inner = len(text) // self._axis.size
        own = slice(self._axis.rank * inner, (self._axis.rank + 1) * inner)
        self._core.set_lengths(text[own], image[own])

    def send(self, x: Tensor, tokens: Tokens = "all") -> Sent:
        return self._core.send(x, tokens)

    def __call__(self, q: Sent, k: Sent, v: Sent, beside: KeysValues | None = None) -> Tensor:
        """Attention of this rank's queries over the newest keys and values at hand of all tokens, `[B, S, H, D]`."""
        core = self._core
        values = v.wait()
        own = torch.stack((k.wait(), values))
        parts = [self._parts(q.tokens, ring) for ring in range(core.ring.size)]
        chunks = [sum(part) for part in parts]
        kept = self._at_site(own, chunks[core.ring.rank])
        places = kept.whole.split(parts[core.ring.rank], dim=3)
        places[self._axis.rank].copy_(own)
        self._take_in(kept, places)
        self._start(kept, own, places)
        if self._is_synchronous:
            self._take_in(kept, places)
        return core.gather(core.attend(q.wait(), kept.whole, chunks, beside), q)

    def _parts(self, tokens: Tokens, ring: int) -> list[int]:
        """Of the tokens of the ring rank `ring`, those that each rank of `axis` computes."""
        lengths, ulysses, rings = self._lengths[tokens], self._core.ulysses.size, self._core.ring.size
        chunks = [sum(lengths[start : start + ulysses]) for start in range(0, len(lengths), ulysses)]
        return chunks[ring::rings]

    def _at_site(self, own: Tensor, length: int) -> Kept:
        """What is kept at the site whose turn it is: every block calls its sites in the same order."""
        place = (self._condition, self._site)
        self._site += 1
        if place not in self._kept:
            self._kept[place] = Kept(own.new_empty((*own.shape[:3], length, own.shape[4])))
        return self._kept[place]

    def _start(self, kept: Kept, own: Tensor, places: Sequence[Tensor]) -> None:
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

    def _take_in(self, kept: Kept, places: Sequence[Tensor]) -> None:
        """Put the other ranks' keys and values that were under way where they belong."""
        if kept.coming is None:
            return
        received = kept.coming.wait().view(len(kept.sources), -1)
        for source, part in zip(kept.sources, received, strict=True):
            if source != self._axis.rank:
                place = places[source]
                place.copy_(part[: place.numel()].view(place.shape))
        kept.coming = None
