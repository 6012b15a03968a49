"""The one owner of the device mesh: which ranks form which axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist

from ..layout.layout import AXES, REPLICAS, Layout
from .axis import Axis
from .groups import new_group
from .ledger import Ledger

_COMBINED = {"sequence": ("ulysses", "ring", "distrifusion"), "replicas": REPLICAS}
"""Axes over several mesh axes at once: ranks that share one picture's tokens; those that compute with one part."""

GroupOf = Callable[[Sequence[int]], dist.ProcessGroup]


class Mesh:
    """The axes of a layout over all ranks, as this rank sees them.

    Ranks are numbered with the first of `layout.AXES` changing fastest, so tensor-parallel peers are neighbours. All
    ranks build the mesh at the same time. `ledger`: what counts the traffic, by default one of its own; `group_of`:
    gives a group of these ranks for one axis. Raises `ValueError` when the degrees do not multiply to the number of
    ranks.
    """

    def __init__(self, layout: Layout, ledger: Ledger | None = None, group_of: GroupOf = new_group) -> None:
        if layout.ranks != dist.get_world_size():
            raise ValueError(f"a mesh of {layout.ranks} ranks ({layout}) in a world of {dist.get_world_size()}")
        self.layout = layout
        self.ledger = ledger or Ledger()
        self._group_of = group_of
        self.axes: list[Axis] = []  # all of those below
        self.tensor, self.ulysses, self.ring, self.distrifusion, self.pipefusion, self.cfg, self.data = (
            self._axis(axis, (axis,)) for axis in AXES
        )
        # Each stream has a communicator of its own: between two stages, sends of one would queue behind receives of
        # the other.
        self.forward = self._axis("stages", ("pipefusion",))
        self.feedback = self._axis("feedback", ("pipefusion",))
        self.skips = self._axis("skips", ("pipefusion",))
        self.sequence, self.replicas = (self._axis(name, members) for name, members in _COMBINED.items())

    def _axis(self, name: str, members: tuple[str, ...]) -> Axis:
        base = rank = dist.get_rank()
        offsets = [0]
        stride = 1
        for axis in AXES:
            degree = self.layout.degree(axis)
            if axis in members:
                base -= (rank // stride) % degree * stride
                offsets = [offset + index * stride for index in range(degree) for offset in offsets]
            stride *= degree
        ranks = [base + offset for offset in offsets]
        self.axes.append(Axis(name, ranks, self._group_of(ranks) if len(ranks) > 1 else None, self.ledger))
        return self.axes[-1]
