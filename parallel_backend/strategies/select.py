"""The strategy of a layout."""

from __future__ import annotations

from ..attention.site import Attention
from ..attention.usp import AttentionCore
from ..distributed.mesh import Mesh
from ..families.family import Family
from ..layout.layout import Layout
from .distrifusion import DistriFusion
from .sequence import SequenceParallel


def strategy_of(layout: Layout, family: Family, mesh: Mesh, attention: Attention) -> SequenceParallel:
    """What predicts for whole pictures."""
    if mesh.distrifusion.size == 1:
        return SequenceParallel(family, mesh.sequence, attention)
    assert isinstance(attention, AttentionCore)
    in_turn = layout.refresh == "in_turn"
    return DistriFusion(family, mesh, attention, warmup_steps=layout.warmup_steps, in_turn=in_turn)
