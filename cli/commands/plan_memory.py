"""How much memory the weights of a model take on a rank, from its published config alone."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from ...parallel_backend.families.spec import FamilySpec
from ...parallel_backend.layout.layout import Layout
from ...parallel_backend.layout.stages import Stage, block_parameters

BYTES = 2
"""Of a parameter, in bf16 and fp16."""
AT_ONCE = 2
"""Blocks that are whole at a time where weights are sharded or offloaded."""


def shapes_of(spec: FamilySpec, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters of the network, which is built without memory."""
    from ...parallel_backend.weights.load import empty_module

    return {name: tuple(each.shape) for name, each in empty_module(spec.class_name, config).named_parameters()}


def weight_bytes(layout: Layout, spec: FamilySpec, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """What the weights take on the fullest rank of `layout`, in bf16; on the GPU, where they are offloaded.

    Tensor parallelism is reckoned to divide all of a block: it leaves norms whole, less than 1% of a model.
    """
    blocks = list(block_parameters(shapes, spec.blocks).values())
    outside = sum(map(prod, shapes.values())) - sum(blocks)
    stages = layout.pipefusion_degree
    sharers = layout.ranks // stages // layout.tensor_degree
    kept = []
    for stage in range(stages):
        own = blocks[Stage(stage, stages, layout.stage_blocks).blocks(blocks)]
        whole = sum(sorted(own)[-AT_ONCE:])
        kept.append({"whole": sum(own), "sharded": sum(own) / sharers + whole, "offloaded": whole}[layout.weights])
    return round(BYTES * (outside + max(kept) / layout.tensor_degree))
