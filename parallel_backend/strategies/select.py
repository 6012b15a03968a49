"""The strategy of a layout, and its attention."""

from __future__ import annotations

from ..attention.site import Attention
from ..attention.usp import AttentionCore, make_attention
from ..caches.policy import StepCache
from ..distributed.mesh import Mesh
from ..families.family import Family, TokenFamily
from ..families.plain import PlainFamily
from ..layout.layout import Layout
from ..tokens.grid import Packing
from .distrifusion import DistriFusion
from .row_parallel import RowParallel
from .sequence import SequenceParallel


def attention_of(layout: Layout, mesh: Mesh, family: Family) -> Attention:
    """Attention over the ranks that share a sequence. Raises `UserError` where its kernel cannot run here."""
    return make_attention(
        layout.attention,
        mesh.ulysses,
        mesh.ring,
        family.device,
        family.dtype,
        preferred=layout.preferred_attention,
    )


def strategy_of(
    layout: Layout, family: Family, mesh: Mesh, attention: Attention, packing: Packing, cache: StepCache
) -> SequenceParallel | RowParallel:
    """What predicts for whole latents."""
    if isinstance(family, PlainFamily):
        return RowParallel(family, mesh.sequence, attention)
    assert isinstance(family, TokenFamily)
    if mesh.distrifusion.size == 1:
        return SequenceParallel(family, mesh.sequence, attention, packing, cache)
    assert isinstance(attention, AttentionCore)
    in_turn = layout.refresh == "in_turn"
    return DistriFusion(family, mesh, attention, packing, cache, warmup_steps=layout.warmup_steps, in_turn=in_turn)
