"""Which attention heads a tensor-parallel rank has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..layout.model_part import ALL, Share
from ..layout.split import split_sizes
from .spec import HeadGroup


class OwnHeads:
    """The heads of every group that each share of a model has; `share` is this rank's.

    Heads of one group are given out whole, in order. Of a group that serves query heads a share has those that its own
    query heads attend to: where there are fewer than shares, several have the same.
    """

    def __init__(self, groups: Mapping[str, HeadGroup], config: Mapping[str, Any], share: Share = ALL) -> None:
        """`config`: the arguments of the model's class. Raises `UserError` where heads do not serve equally many."""
        self.share = share
        self._counts: dict[str, int] = {name: config[group.count] for name, group in groups.items()}
        self._dims = {name: _width(group, config) for name, group in groups.items()}
        self._served = {name: group.serves for name, group in groups.items() if group.serves}
        for name, queries in self._served.items():
            if not self._counts[name] or self._counts[queries] % self._counts[name]:
                raise UserError(
                    f"{self._counts[queries]} {queries} cannot be served by {self._counts[name]} {name} each of which "
                    "serves as many."
                )

    def count(self, group: str) -> int:
        """How many heads `group` has in the whole model."""
        return self._counts[group]

    def dim(self, group: str) -> int:
        """Channels of one head."""
        return self._dims[group]

    def own(self, group: str, index: int | None = None) -> range:
        """The heads of `group` that share number `index` has, or this rank's."""
        index = self.share.index if index is None else index
        if group in self._served:
            queries, each = self.own(self._served[group], index), self._each_serves(group)
            return range(queries.start // each, -(-queries.stop // each) if queries else queries.start // each)
        sizes = split_sizes(self._counts[group], self.share.count)
        start = sum(sizes[:index])
        return range(start, start + sizes[index])

    def counted(self, group: str) -> range:
        """Those of this rank's heads that no share before it has: all shares together count every head once."""
        own, before = self.own(group), [self.own(group, index) for index in range(self.share.index)]
        return range(max((each.stop for each in before if each), default=own.start), own.stop) if own else own

    def serves(self, group: str) -> list[int]:
        """Returns, for each of this rank's query heads in order, which of its heads of `group` serves it; see
        `Attention.send`."""
        first, each = self.own(group).start, self._each_serves(group)
        return [query // each - first for query in self.own(self._served[group])]

    def _each_serves(self, group: str) -> int:
        """How many query heads a head of `group` serves."""
        return self._counts[self._served[group]] // self._counts[group]


def _width(group: HeadGroup, config: Mapping[str, Any]) -> int:
    """Channels of one head of the group."""
    width = group.width
    if callable(width):
        return width(config)
    return width if isinstance(width, int) else config[width]
