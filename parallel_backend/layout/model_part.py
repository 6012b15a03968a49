"""Which part of a model a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .stages import Stage

if TYPE_CHECKING:
    from ..distributed.mesh import Mesh
    from .layout import Layout


@dataclass(frozen=True)
class Share:
    """Share `index` of `count`."""

    index: int = 0
    count: int = 1


ALL = Share()
ONE_STAGE = Stage()


@dataclass(frozen=True)
class ModelPart:
    """The blocks of `stage`; of their linear layers the share `tensor`; of the bytes of that the share `shard`.

    With a `shard` (even one of one), blocks are put together when they are computed; with `offload` the share is kept
    in host memory meanwhile.
    """

    stage: Stage = ONE_STAGE
    tensor: Share = ALL
    shard: Share | None = None
    offload: bool = False

    @classmethod
    def of(cls, layout: Layout, mesh: Mesh) -> ModelPart:
        """This rank's part in runs of `layout`."""
        return cls(
            Stage(mesh.pipefusion.rank, mesh.pipefusion.size, layout.stage_blocks),
            Share(mesh.tensor.rank, mesh.tensor.size),
            None if layout.weights == "whole" else Share(mesh.replicas.rank, mesh.replicas.size),
            layout.weights == "offloaded",
        )


WHOLE = ModelPart()
