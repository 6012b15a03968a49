"""A loaded transformer, or this rank's part of one."""

from __future__ import annotations

from pathlib import Path

import torch

from .adapters.layers import AdaptedLayers
from .adapters.names import Names
from .families.base import Family
from .families.registry import build_family
from .mesh import Mesh
from .parts import WHOLE, Part
from .strategies.sharded import ShardedWeights
from .strategies.tensor import TensorParallel
from .weights.load import load_transformer


class Transformer:
    """The block view of a model of which this rank holds `part`. `bytes`: what it takes in memory."""

    def __init__(self, path: Path, device: torch.device, weight_dtype: str = "auto", part: Part = WHOLE) -> None:
        """Raises `UserError` when the file is missing, broken, or of no family that we sample."""
        loaded = load_transformer(path, device=device, weight_dtype=weight_dtype, part=part)
        self.bytes = loaded.bytes
        self._family = build_family(loaded, path)
        self._tensor = TensorParallel(loaded.module, loaded.cuts)
        self.cuts = loaded.cuts
        self.names = Names(loaded.family, loaded.shapes)
        self.adapted = AdaptedLayers(loaded, self._tensor)
        self._sharded = ShardedWeights(loaded.shards) if loaded.shards else None
        if self._sharded:
            blocks = list(self._family.blocks)
            own = part.stage.blocks(self._family.block_parameters)
            blocks[own] = self._sharded.around(blocks[own])
            self._family.blocks = blocks

    def on(self, mesh: Mesh) -> Family:
        """The family, its parts meeting those of the ranks of `mesh`. All of them begin a run with this call."""
        self._tensor.axis = mesh.tensor
        if self._sharded:
            self._sharded.begin(mesh.replicas)
        return self._family

    def let_go(self) -> None:
        """Of what is under way to other ranks, wherever it was interrupted."""
        if self._sharded:
            self._sharded.let_go()
