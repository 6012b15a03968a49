"""Stages of a pipeline: contiguous runs of a model's blocks, and the parameters that each of them needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Any

from .layout import StageBlocks


@dataclass(frozen=True)
class BlockList:
    """Some of a model's blocks: the modules of one number in all of the module lists `names` make up a block.

    `count`: what the model's config calls their number, or computes it. `apart`: modules within blocks that belong to
    none of them, because other parts of the model use them: every stage holds them.
    """

    names: tuple[str, ...]
    count: str | Callable[[Mapping[str, Any]], int] = "num_layers"
    apart: tuple[str, ...] = ()

    def number(self, parameter: str) -> int | None:
        """The number of the block that `parameter` belongs to."""
        if any(parameter.startswith(f"{module}.") for module in self.apart):
            return None
        for name in self.names:
            number, found, _ = parameter.removeprefix(f"{name}.").partition(".")
            if parameter.startswith(f"{name}.") and found and number.isdecimal():
                return int(number)
        return None


@dataclass(frozen=True)
class Stage:
    """Stage `index` of `count`, each of so many blocks as `sizes` says (as `Layout.stage_blocks`).

    `parameters`: how many each of the model's blocks has.
    """

    index: int = 0
    count: int = 1
    sizes: StageBlocks = ()

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def blocks(self, parameters: Sequence[int]) -> slice:
        """This stage's part of a model's blocks."""
        sizes = self._sizes(parameters)
        start = sum(sizes[: self.index])
        return slice(start, start + sizes[self.index])

    def owners(self, parameters: Sequence[int]) -> list[int]:
        """The index of the stage that holds each of a model's blocks."""
        return [index for index, size in enumerate(self._sizes(parameters)) for _ in range(size)]

    def settled(self, parameters: Sequence[int]) -> Stage:
        """The same stage with its sizes filled in for a model."""
        return replace(self, sizes=self._sizes(parameters))

    def _sizes(self, parameters: Sequence[int]) -> tuple[int, ...]:
        if self.sizes == "even":
            fewest, more = divmod(len(parameters), self.count)
            return tuple(fewest + (index < more) for index in range(self.count))
        return self.sizes or balanced_sizes(tuple(parameters), self.count)


@lru_cache(maxsize=32)
def balanced_sizes(parameters: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """How many blocks each stage has, so that the fullest stage has as few parameters as possible.

    Of several such splits, one whose second fullest has as few as possible, and so on.
    """
    ends = list(accumulate(parameters, initial=0))
    # By the number of blocks that they hold, the best split into the stages so far: their parameters in falling order,
    # and their sizes. Two such lists compare as before when both get one number more, so no other split can catch up.
    best: dict[int, tuple[list[int], tuple[int, ...]]] = {0: ([], ())}
    for _ in range(stages):
        best = {
            stop: min(
                (sorted([*held, ends[stop] - ends[start]], reverse=True), (*sizes, stop - start))
                for start, (held, sizes) in best.items()
                if start <= stop
            )
            for stop in range(len(ends))
        }
    return best[len(parameters)][1]


def block_of(name: str, blocks: Sequence[BlockList]) -> tuple[int, int] | None:
    """The list and the number of the block that the parameter `name` belongs to; such pairs sort as they compute."""
    for place, each in enumerate(blocks):
        if (number := each.number(name)) is not None:
            return place, number
    return None


def block_parameters(shapes: Mapping[str, Sequence[int]], blocks: Sequence[BlockList]) -> dict[tuple[int, int], int]:
    """How many parameters each block of a whole model has, in the order of computation; `shapes` by their names."""
    counts: dict[tuple[int, int], int] = {}
    for name, shape in shapes.items():
        if block := block_of(name, blocks):
            counts[block] = counts.get(block, 0) + prod(shape)
    return dict(sorted(counts.items()))


def stage_parameters(shapes: Mapping[str, Sequence[int]], blocks: Sequence[BlockList], stage: Stage) -> set[str]:
    """The parameters of a whole model that `stage` needs: its blocks', and all that belong to no block."""
    counts = block_parameters(shapes, blocks)
    own = set(list(counts)[stage.blocks(list(counts.values()))])
    owners = {name: block_of(name, blocks) for name in shapes}
    return {name for name, block in owners.items() if block is None or block in own}
