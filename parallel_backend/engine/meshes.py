"""The meshes of the layouts that ran last, and what was sent in every layout's last run."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence

import torch.distributed as dist

from ..distributed.groups import new_group
from ..distributed.ledger import Ledger
from ..distributed.mesh import Mesh
from ..layout.layout import Layout

MOST = 2
"""A mesh has up to a dozen groups of ranks, each with connections of its own."""


class Meshes:
    """All ranks ask for the same meshes in the same order: so they make them, and give up the oldest, together.

    The groups of one that is given up serve the next one that has axes over the same ranks. They are not left: torch
    would give the next group their names, under which their addresses still stand in its store.
    """

    def __init__(self) -> None:
        self._held: OrderedDict[Layout, Mesh] = OrderedDict()
        self._spare: defaultdict[tuple[int, ...], list[dist.ProcessGroup]] = defaultdict(list)
        self._ledgers: dict[Layout, Ledger] = {}

    def of(self, layout: Layout, settle: Callable[[], None]) -> Mesh:
        """The mesh of the layout's degrees. `settle` ends what is under way in meshes before one of them goes."""
        degrees = layout.degrees
        if degrees not in self._held:
            if len(self._held) == MOST:
                settle()
                _, oldest = self._held.popitem(last=False)
                for axis in oldest.axes:
                    self._spare[axis.ranks] += axis.release()
            ledger = self._ledgers.setdefault(degrees, Ledger())
            self._held[degrees] = Mesh(degrees, ledger, self._group_of)
        self._held.move_to_end(degrees)
        return self._held[degrees]

    def traffic(self) -> dict[str, dict[str, dict[str, int]]]:
        """What this rank sent in the last run of each layout, ready for JSON; also of those whose mesh is gone."""
        return {str(layout): ledger.summary() for layout, ledger in self._ledgers.items()}

    def abandon(self) -> list[dist.ProcessGroup]:
        """All groups, for `abandon_groups`; no mesh is left."""
        groups = [group for mesh in self._held.values() for axis in mesh.axes for group in axis.release()]
        groups += [group for spare in self._spare.values() for group in spare]
        self._held.clear()
        self._spare.clear()
        return groups

    def _group_of(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        spare = self._spare[tuple(ranks)]
        return spare.pop(0) if spare else new_group(ranks)
