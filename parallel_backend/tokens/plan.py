"""Which tokens each rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from ..layout.split import split_sizes


@dataclass(frozen=True)
class PatchPlan:
    """Which tokens each sequence-parallel rank holds of each patch. The text belongs to patch 0.

    `text_sizes[rank]`, `image_sizes[patch][rank]`: numbers of tokens. Uneven and empty shares are fine. Over all
    patches a rank holds its text, then its image tokens patch by patch: so it does when the whole picture is at hand,
    and so its keys and values are kept. One order for both is what makes a patch find its own place.
    """

    text_sizes: tuple[int, ...]
    image_sizes: tuple[tuple[int, ...], ...]

    @classmethod
    def even(cls, text_length: int, patch_lengths: Sequence[int], ranks: int) -> PatchPlan:
        text_sizes = split_sizes(text_length, ranks)[::-1]
        return cls(tuple(text_sizes), tuple(tuple(split_sizes(length, ranks)) for length in patch_lengths))

    def text_size(self, rank: int, patches: Sequence[int]) -> int:
        return self.text_sizes[rank] if 0 in patches else 0

    def image_size(self, rank: int, patches: Sequence[int]) -> int:
        return sum(self.image_sizes[patch][rank] for patch in patches)

    def text_lengths(self, patches: Sequence[int]) -> list[int]:
        """How many text tokens of `patches` each rank holds."""
        return [self.text_size(rank, patches) for rank in range(len(self.text_sizes))]

    def image_lengths(self, patches: Sequence[int]) -> list[int]:
        """How many image tokens of `patches` each rank holds."""
        return [self.image_size(rank, patches) for rank in range(len(self.text_sizes))]

    def lengths(self, patches: Sequence[int], tokens: Tokens = "all") -> list[int]:
        """How many `tokens` of `patches` each rank holds."""
        return lengths_by_tokens(self.text_lengths(patches), self.image_lengths(patches))[tokens]

    def offset(self, rank: int, patch: int, tokens: Tokens) -> int:
        """Where among all `tokens` of `rank` those of `patch` begin."""
        return self.lengths(range(patch), tokens)[rank]

    def shard(self, rank: int, patches: Sequence[int]) -> Shard:
        """The tokens of `patches` that `rank` holds, as places in the whole picture."""
        text_start = sum(self.text_sizes[:rank])
        text = slice(text_start, text_start + self.text_size(rank, patches))
        starts = [0, *accumulate(sum(sizes) for sizes in self.image_sizes)]
        places = []
        for patch in patches:
            start = starts[patch] + sum(self.image_sizes[patch][:rank])
            places.append(range(start, start + self.image_sizes[patch][rank]))
        if len(self.text_sizes) == 1 or len(patches) == 1:
            return Shard(text, slice(places[0].start, places[-1].stop))
        return Shard(text, torch.cat([torch.arange(each.start, each.stop) for each in places]))

    def in_order(self, gathered: Tensor, patches: Sequence[int]) -> Tensor:
        """Image tokens of `patches` `[B, S, c]`, from rank by rank to row by row."""
        if len(self.text_sizes) == 1 or len(patches) == 1:
            return gathered
        places = [self.shard(rank, patches).image for rank in range(len(self.text_sizes))]
        ordered = torch.empty_like(gathered)
        ordered[:, torch.cat(places).to(gathered.device)] = gathered  # pyright: ignore[reportArgumentType]
        return ordered


Tokens = Literal["all", "image"]
"""What a site attends over: text and image together, or the image alone."""


def lengths_by_tokens(text: Sequence[int], image: Sequence[int]) -> dict[Tokens, list[int]]:
    """How many tokens each rank holds of what a site may attend over."""
    return {"all": [sum(both) for both in zip(text, image, strict=True)], "image": list(image)}


@dataclass(frozen=True)
class Shard:
    """Which tokens of the whole a rank holds, of the text and of the image (row by row): a range, or their indices."""

    text: slice
    image: slice | Tensor


@dataclass(frozen=True)
class TokenPlan:
    """How many text and image tokens each sequence-parallel rank holds. Uneven and empty shares are fine."""

    text_sizes: tuple[int, ...]
    image_sizes: tuple[int, ...]

    @classmethod
    def even(cls, text_length: int, image_length: int, ranks: int) -> TokenPlan:
        # The ranks that get a longer share of the image get a shorter share of the text, so that loads stay level.
        text_sizes = split_sizes(text_length, ranks)[::-1]
        return cls(tuple(text_sizes), tuple(split_sizes(image_length, ranks)))

    def of_first(self, count: int) -> TokenPlan:
        """The same shares of only the first `count` image tokens."""
        ends = accumulate(self.image_sizes)
        sizes = (min(size, max(0, count - end + size)) for size, end in zip(self.image_sizes, ends, strict=True))
        return TokenPlan(self.text_sizes, tuple(sizes))

    def shard(self, rank: int) -> Shard:
        return Shard(text=_range(self.text_sizes, rank), image=_range(self.image_sizes, rank))


def _range(sizes: tuple[int, ...], index: int) -> slice:
    ends = list(accumulate(sizes))
    return slice(ends[index] - sizes[index], ends[index])
