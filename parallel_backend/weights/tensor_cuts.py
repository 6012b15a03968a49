"""How tensor-parallel ranks cut linear layers (Megatron-LM, arXiv 1909.08053, section 3), by a family's table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

from ..families.spec import Cut
from ..layout.model_part import Share
from ..layout.split import split_sizes

IN_BLOCK = re.compile(r"\w+\.\d+\.(.+)")
FEATURE_UNIT = 16
"""Features go to ranks in groups of as many, where they can: matrix units want rows of 16 bytes."""


@dataclass(frozen=True)
class Slices:
    """The places `ranges` of dim `dim`, put side by side."""

    dim: int
    ranges: tuple[range, ...]

    @property
    def extent(self) -> int:
        return sum(map(len, self.ranges))

    def of(self, tensor: Tensor) -> Tensor:
        """A view if it is one range, else a copy."""
        parts = [tensor.narrow(self.dim, part.start, len(part)) for part in self.ranges]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], self.dim).view(tensor.dtype)


class TensorCuts:
    """What share `share` of a model holds of its linear layers.

    `config`: the arguments of the diffusers class, which tell the number and the width of its attention heads.
    """

    def __init__(self, table: Sequence[Cut], config: Mapping[str, Any], share: Share) -> None:
        self.share = share
        self._table = [(re.compile(cut.layers), cut) for cut in table]
        self._head_dim = config["attention_head_dim"]
        self._heads_width = config["num_attention_heads"] * self._head_dim

    def cut_of(self, layer: str) -> Cut | None:
        """How the linear layer of that name in the model is cut."""
        inside = IN_BLOCK.fullmatch(layer)
        if self.share.count == 1 or inside is None:
            return None
        return next((cut for pattern, cut in self._table if pattern.fullmatch(inside[1])), None)

    def holds(self, parameter: str) -> bool:
        """False for the bias of a "row" layer on all shares but the first: it is to be added once."""
        layer, _, leaf = parameter.rpartition(".")
        cut = self.cut_of(layer)
        return self.share.index == 0 or leaf != "bias" or cut is None or cut.style != "row"

    def slices(self, parameter: str, shape: Sequence[int]) -> Slices | None:
        """What this share takes of the parameter of that name and whole shape; None for all of it."""
        layer, _, leaf = parameter.rpartition(".")
        cut = self.cut_of(layer)
        if cut is None or leaf not in ("weight", "bias") or (cut.style == "row" and leaf == "bias"):
            return None
        dim = 1 if cut.style == "row" else 0
        return Slices(dim, self._ranges(cut, shape[dim], self.share.index))

    def extents(self, cut: Cut, size: int) -> list[int]:
        """How much every share has of a dim of `size`."""
        return [sum(map(len, self._ranges(cut, size, index))) for index in range(self.share.count)]

    def _ranges(self, cut: Cut, size: int, index: int) -> tuple[range, ...]:
        heads = cut.spans.count("heads")
        features = (size - heads * self._heads_width) // max(1, len(cut.spans) - heads)
        ranges, start = [], 0
        for span in cut.spans:
            is_heads = span == "heads"
            width = self._heads_width if is_heads else features
            unit = self._head_dim if is_heads else gcd(features, FEATURE_UNIT)
            # The shares that get more of the heads get less of the features.
            counts = split_sizes(width // unit, self.share.count)[:: 1 if is_heads else -1]
            first = start + sum(counts[:index]) * unit
            ranges.append(range(first, first + counts[index] * unit))
            start += width
        return tuple(ranges)
