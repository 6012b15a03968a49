"""Stages of a pipeline: contiguous runs of a model's blocks, and the parameters that each of them needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .comm import split_sizes


@dataclass(frozen=True)
class Stage:
    """Stage `index` of `count`, each of so many blocks as `sizes` says: by default as evenly as possible."""

    index: int = 0
    count: int = 1
    sizes: tuple[int, ...] = ()

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def blocks(self, total: int) -> slice:
        """This stage's part of a model's `total` blocks."""
        sizes = self.sizes or split_sizes(total, self.count)
        start = sum(sizes[: self.index])
        return slice(start, start + sizes[self.index])

    def owners(self, total: int) -> list[int]:
        """The index of the stage that holds each of a model's `total` blocks."""
        return [index for index, size in enumerate(self.sizes or split_sizes(total, self.count)) for _ in range(size)]


def block_of(name: str, block_lists: Sequence[str]) -> tuple[int, int] | None:
    """The list and the number of the block that the parameter `name` belongs to; such pairs sort as they compute.

    `block_lists`: the module lists that hold the blocks, in the order of computation.
    """
    found = re.match(rf"({'|'.join(block_lists)})\.(\d+)\.", name)
    return (block_lists.index(found[1]), int(found[2])) if found else None


def stage_parameters(names: Iterable[str], block_lists: Sequence[str], stage: Stage) -> set[str]:
    """Those of a model's parameter `names` that `stage` needs: its blocks', and all that belong to no block."""
    owners = {name: owner for name in names if (owner := block_of(name, block_lists))}
    order = sorted(set(owners.values()))
    own = set(order[stage.blocks(len(order))])
    return {name for name in names if name not in owners or owners[name] in own}
