"""A loaded transformer, or this rank's part of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..adapters.lora.layers import AdaptedLayers
from ..adapters.lora.module_names import Names
from ..distributed.axis import keep_talk_out_of_compiled_blocks
from ..distributed.mesh import Mesh
from ..families.blocks import Block, compiled
from ..families.family import Family, TokenFamily
from ..families.registry import load_view
from ..files.latents import latents_of
from ..layout.model_part import WHOLE, ModelPart
from ..strategies.sharded_weights import ShardedWeights
from ..strategies.tensor import TensorParallel
from ..weights.load import LoadedTransformer, load_transformer
from .first_pass import FirstPass

if TYPE_CHECKING:
    from ..run_context import Run


def build_family(loaded: LoadedTransformer, path: Path) -> Family:
    """The view of the network loaded from `path`."""
    device = next(parameter.device for parameter in loaded.module.parameters() if not parameter.is_meta)
    family: Family = load_view(loaded.spec)(
        loaded.module, loaded.compute_dtype, device, latents_of(loaded.spec, loaded.config, path)
    )
    family.block_parameters = loaded.block_parameters
    if isinstance(family, TokenFamily):
        family.heads = loaded.cuts.heads
    return family


class Transformer:
    """The block view of a model of which this rank holds `part`. `bytes`: what it takes in memory."""

    def __init__(
        self,
        path: Path,
        device: torch.device,
        weight_dtype: str = "auto",
        part: ModelPart = WHOLE,
        check_cancelled: Callable[[], None] = lambda: None,
    ) -> None:
        """Raises `UserError` when the file is missing, broken, or of no family that we sample."""
        loaded = load_transformer(
            path, device=device, weight_dtype=weight_dtype, part=part, check_cancelled=check_cancelled
        )
        self.bytes = loaded.bytes
        self._tensor = TensorParallel(loaded.module, loaded.cuts)
        self.family = build_family(loaded, path)
        self.cuts = loaded.cuts
        self.names = Names(loaded.spec, loaded.shapes)
        self.adapted = AdaptedLayers(loaded, self._tensor)
        self._sharded = ShardedWeights(loaded.shards) if loaded.shards else None
        self._own = part.stage.blocks(self.family.block_parameters)
        self._plain = self.family.blocks
        self._blocks = self._gathered(self._plain)
        self._compiled: FirstPass | None = None

    def on(self, mesh: Mesh) -> Family:
        """The family, its parts meeting those of the ranks of `mesh`. All of them begin a run with this call."""
        self._tensor.axis = mesh.tensor
        self.family.blocks = self._blocks
        if self._sharded:
            self._sharded.begin(mesh.replicas)
            if isinstance(self.family, TokenFamily):
                self.family.hold_first_block = partial(self._sharded.hold, 0)
        return self.family

    def compile_blocks(self, run: Run) -> FirstPass | None:
        """Compute the run that `on` began with compiled blocks, and return these; with plain ones, and return None,
        where more than plain LoRAs are on."""
        if self.adapted.change_weights:
            run.log(
                "info",
                "Blocks under LoHa, LoKr, DoRA or whole differences are not compiled: every layer with one would be "
                "compiled by itself.",
            )
            return None
        keep_talk_out_of_compiled_blocks()
        self._compiled = self._compiled or FirstPass(self._gathered(compiled(self._plain)), self._own)
        self.family.blocks = self._compiled.blocks
        return self._compiled

    def settle(self) -> None:
        """End what is under way to other ranks, which all do."""
        if self._sharded:
            self._sharded.settle()

    def abandon(self) -> None:
        """Drops all transfers to other ranks that are under way, wherever they were interrupted."""
        if self._sharded:
            self._sharded.abandon()

    def _gathered(self, blocks: Sequence[Block]) -> Sequence[Block]:
        """The blocks, with their weights put together while they compute where these are sharded."""
        if self._sharded is None:
            return blocks
        return [*blocks[: self._own.start], *self._sharded.around(blocks[self._own]), *blocks[self._own.stop :]]
