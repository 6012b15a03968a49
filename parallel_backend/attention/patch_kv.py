"""Attention over the keys and values of a whole picture, while only a patch of its tokens is at hand (PipeFusion)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tokens.plan import PatchPlan, Tokens
from .site import KeysValues, Sent
from .usp import AttentionCore


class PatchAttention:
    """The attention of one stage's blocks. Each site keeps the keys and values of all tokens, the newest it has seen.

    They are kept as they are after the Ulysses all-to-all: this rank's heads of the tokens of its ring chunk. A ring
    passes them on whole, so that each patch costs the hops that a whole picture costs without PipeFusion.
    """

    keeps = True

    def __init__(self, core: AttentionCore, plans: Sequence[PatchPlan]) -> None:
        """`plans`: one for each condition that is evaluated here."""
        self._core = core
        self._plans = plans
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._condition = self._site = 0
        self._patches: Sequence[int] = ()
        self._seen: Sequence[int] = ()

    def begin(self, condition: int, patches: Sequence[int], *, seen: int) -> None:
        """What comes next through the blocks: the tokens of `patches`, under the condition of that number.

        `seen`: how many patches, from the first on, have keys and values by then.
        """
        self._condition, self._patches, self._site = condition, patches, 0
        self._seen = range(seen)
        plan = self._plans[condition]
        self.set_lengths(plan.text_lengths(patches), plan.image_lengths(patches))

    def plan(self, condition: int) -> PatchPlan:
        """Of the condition of that number."""
        return self._plans[condition]

    def forget(self) -> None:
        """Free what is kept."""
        self._kept.clear()

    def set_lengths(self, text: Sequence[int], image: Sequence[int]) -> None:
        self._core.set_lengths(text, image)

    def send(self, x: Tensor, tokens: Tokens = "all") -> Sent:
        return self._core.send(x, tokens)

    def __call__(self, q: Sent, k: Sent, v: Sent, beside: KeysValues | None = None) -> Tensor:
        """Attention of this rank's queries over the newest keys and values of all tokens, `[B, S, H, D]`."""
        core, plan = self._core, self._plans[self._condition]
        values = v.wait()
        keys_values = (k.wait(), values)
        totals = plan.lengths(range(len(plan.image_sizes)), q.tokens)
        seen = plan.lengths(self._seen, q.tokens)
        kept = self._kept_by_site(keys_values[0], self._chunks(totals)[core.ring.rank])
        self._keep(kept, keys_values, q.tokens, totals)
        begun = self._begun(kept, seen, totals)
        return core.gather(core.attend(q.wait(), begun, self._chunks(seen), beside), q)

    def _chunks(self, lengths: Sequence[int]) -> list[int]:
        """The lengths of the chunks that the ranks of the ring hold, from those of all ranks."""
        ulysses = self._core.ulysses.size
        return [sum(lengths[ring * ulysses : (ring + 1) * ulysses]) for ring in range(self._core.ring.size)]

    def _begun(self, kept: Tensor, seen: Sequence[int], totals: Sequence[int]) -> Tensor:
        """What has been filled of `kept`: of each rank's tokens, the first ones."""
        if seen == totals:
            return kept
        own = slice(
            self._core.ring.rank * self._core.ulysses.size, (self._core.ring.rank + 1) * self._core.ulysses.size
        )
        parts = zip(kept.split(totals[own], dim=3), seen[own], strict=True)
        return torch.cat([part[:, :, :, :length] for part, length in parts], dim=3)

    def _kept_by_site(self, like: Tensor, length: int) -> Tensor:
        """The `[2, B, h, S_chunk, D]` of the site whose turn it is: every block calls its sites in the same order."""
        place = (self._condition, self._site)
        self._site += 1
        if place not in self._kept:
            self._kept[place] = like.new_zeros((2, *like.shape[:2], length, like.shape[3]))
        return self._kept[place]

    def _keep(self, kept: Tensor, keys_values: Sequence[Tensor], tokens: Tokens, totals: list[int]) -> None:
        """Put the keys and values of the patches at hand, rank after rank of the chunk, where they belong."""
        first = self._core.ring.rank * self._core.ulysses.size
        plan = self._plans[self._condition]
        lengths = plan.lengths(self._patches, tokens)
        source = target = 0
        for rank in range(first, first + self._core.ulysses.size):
            start = target + plan.offset(rank, self._patches[0], tokens)
            for whole, fresh in zip(kept, keys_values, strict=True):
                whole[:, :, start : start + lengths[rank]] = fresh[:, :, source : source + lengths[rank]]
            source += lengths[rank]
            target += totals[rank]
