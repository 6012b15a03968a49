"""Which tokens of which stream each sequence-parallel rank holds, of each patch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..layout.split import split_sizes
from .grid import Grid

Patches = Sequence[int]
"""The numbers of neighbouring patches."""

Places = slice | Tensor
"""Places of tokens within a stream: a range, or their indices `[S]`."""

Shard = Mapping[str, Places]
"""The tokens that a rank holds of each stream, by name."""


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of a stream that are cut in the same way.

    `grid`: of tokens that are cut into patches; tokens without one belong to patch 0. `unit`: how many tokens stay
    together on a rank. `predicts`: the latent that the model predicts at them, if it does.
    """

    count: int
    grid: Grid | None = None
    unit: int = 1
    predicts: str | None = None

    @classmethod
    def of(cls, grid: Grid, predicts: str | None = None, unit: int = 1) -> Segment:
        return cls(grid.count, grid, unit, predicts)

    def patch_ranges(self, patches: int) -> list[list[range]]:
        """The tokens of each of so many patches, counted within the segment."""
        if self.grid is None or patches == 1:
            return [[range(self.count)], *([] for _ in range(patches - 1))]
        axis = self.grid.cut_axis(patches)
        edges = accumulate(split_sizes(self.grid.extent(axis), patches), initial=0)
        return [self.grid.ranges(axis, start, stop) for start, stop in pairwise(edges)]

    def share_sizes(self, count: int, ranks: int) -> list[int]:
        """How many of `count` tokens each rank gets.

        Where they do not divide, the first ranks get more of a grid and the last ones of the rest: loads stay level.
        """
        units, rest = divmod(count, self.unit)
        sizes = [size * self.unit for size in split_sizes(units, ranks)]
        sizes = sizes if self.grid else sizes[::-1]
        sizes[-1] += rest
        return sizes


class TokenPlan:
    """The tokens of every stream, given out over patches and within each patch over ranks.

    Uneven and empty shares are fine. Of a stream a rank holds its tokens patch by patch, and within a patch segment by
    segment, when one patch is at hand as when all are: so its keys and values find their places in what is kept.
    """

    def __init__(self, streams: Mapping[str, Sequence[Segment]], ranks: int, patches: int = 1) -> None:
        self.streams = {name: tuple(segments) for name, segments in streams.items()}
        self.ranks = ranks
        self.patches = range(patches)
        self._places = {name: self._given_out(segments) for name, segments in self.streams.items()}
        self.sizes = {
            name: [[sum(map(len, ranges)) for ranges in of_ranks] for of_ranks in places]
            for name, places in self._places.items()
        }
        """`sizes[stream][patch][rank]`: numbers of tokens."""

    def size(self, stream: str, rank: int, patches: Patches) -> int:
        return sum(self.sizes[stream][patch][rank] for patch in patches)

    def lengths(self, patches: Patches | None = None) -> dict[str, list[int]]:
        """How many tokens of `patches` (all) each rank holds, by stream."""
        patches = self.patches if patches is None else patches
        return {name: [self.size(name, rank, patches) for rank in range(self.ranks)] for name in self.streams}

    def shard(self, rank: int, patches: Patches | None = None) -> dict[str, Places]:
        """The tokens of `patches` (all) that `rank` holds, as places in their whole streams."""
        patches = self.patches if patches is None else patches
        return {
            name: _as_places(each for patch in patches for each in places[patch][rank])
            for name, places in self._places.items()
        }

    def predicted(self, latent: str, rank: int, patches: Patches | None = None) -> Places:
        """Where among its tokens of `patches` of the stream `rank` holds those at which `latent` is predicted."""
        stream, number = self._predicting[latent]
        starts, own, position = self._starts(stream), [], 0
        for patch in self.patches if patches is None else patches:
            for each in self._places[stream][patch][rank]:
                if starts[number] <= each.start < starts[number + 1]:
                    own.append(range(position, position + len(each)))
                position += len(each)
        return _as_places(own)

    def in_order(self, latent: str, gathered: Tensor, patches: Patches | None = None) -> Tensor:
        """Predictions `[B, S, c]` of `latent` in `patches`, from rank by rank to the order of the grid."""
        index = self._order(latent, patches)
        return gathered if isinstance(index, slice) else gathered[:, index.to(gathered.device)]

    def predicted_sizes(self, latent: str, patches: Patches | None = None) -> list[int]:
        """How many predictions of `latent` each rank makes."""
        return [_length(self.predicted(latent, rank, patches)) for rank in range(self.ranks)]

    @cached_property
    def _predicting(self) -> dict[str, tuple[str, int]]:
        """The stream, and the number in it, of the segment at which each latent is predicted."""
        return {
            segment.predicts: (name, number)
            for name, segments in self.streams.items()
            for number, segment in enumerate(segments)
            if segment.predicts
        }

    def _order(self, latent: str, patches: Patches | None) -> Places:
        stream, number = self._predicting[latent]
        starts = self._starts(stream)
        ranges = [
            each
            for rank in range(self.ranks)
            for patch in (self.patches if patches is None else patches)
            for each in self._places[stream][patch][rank]
            if starts[number] <= each.start < starts[number + 1]
        ]
        if all(one.stop <= other.start for one, other in pairwise(ranges)):
            return slice(None)
        return torch.argsort(torch.cat([torch.arange(each.start, each.stop) for each in ranges]))

    def _starts(self, stream: str) -> list[int]:
        return list(accumulate((segment.count for segment in self.streams[stream]), initial=0))

    def _given_out(self, segments: Sequence[Segment]) -> list[list[list[range]]]:
        """`[patch][rank]`: the ranges of tokens of a stream."""
        places: list[list[list[range]]] = [[[] for _ in range(self.ranks)] for _ in self.patches]
        start = 0
        for segment in segments:
            for patch, ranges in enumerate(segment.patch_ranges(len(self.patches))):
                count = sum(map(len, ranges))
                edges = accumulate(segment.share_sizes(count, self.ranks), initial=0)
                for rank, (first, last) in enumerate(pairwise(edges)):
                    own = (range(each.start + start, each.stop + start) for each in _part(ranges, first, last))
                    places[patch][rank] += [each for each in own if len(each)]
            start += segment.count
        return places


def _part(ranges: Iterable[range], start: int, stop: int) -> list[range]:
    """The tokens number `start` to `stop` of those in `ranges`."""
    parts, position = [], 0
    for each in ranges:
        first, last = max(start - position, 0), min(stop - position, len(each))
        if first < last:
            parts.append(each[first:last])
        position += len(each)
    return parts


def _as_places(ranges: Iterable[range]) -> Places:
    """One slice where the ranges follow each other."""
    ranges = [each for each in ranges if len(each)]
    if not ranges:
        return slice(0, 0)
    if all(one.stop == other.start for one, other in pairwise(ranges)):
        return slice(ranges[0].start, ranges[-1].stop)
    return torch.cat([torch.arange(each.start, each.stop) for each in ranges])


def _length(places: Places) -> int:
    return places.stop - places.start if isinstance(places, slice) else len(places)
