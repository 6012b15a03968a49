"""How tensor-parallel ranks cut layers (Megatron-LM, arXiv 1909.08053, section 3), by a family's table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

from ..families.heads import OwnHeads
from ..families.spec import FEATURES, Cut, HeadGroup
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
    """What share `share` of a model holds of its layers: `heads` of its attention, and parts of features.

    `groups`: those that the cuts of `table` name. `config`: the arguments of the diffusers class, which give the number
    and the width of their heads.
    """

    def __init__(
        self, table: Sequence[Cut], groups: Mapping[str, HeadGroup], config: Mapping[str, Any], share: Share
    ) -> None:
        self.share = share
        self.heads = OwnHeads(groups, config, share)
        self._table = [(re.compile(cut.layers), cut) for cut in table]

    def cut_of(self, layer: str) -> Cut | None:
        """How the layer of that name in the model is cut."""
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
        heads = self.heads
        widths = {span: heads.count(span) * heads.dim(span) for span in cut.spans if span != FEATURES}
        rest = size - sum(widths[span] for span in cut.spans if span != FEATURES)
        features = widths[FEATURES] = rest // max(1, cut.spans.count(FEATURES))
        ranges, start = [], 0
        for span in cut.spans:
            if span == FEATURES:
                unit = gcd(features, FEATURE_UNIT)
                # The shares that get more of the heads get less of the features.
                counts = split_sizes(features // unit, self.share.count)[::-1]
                own = range(sum(counts[:index]), sum(counts[: index + 1]))
            else:
                unit, own = heads.dim(span), heads.own(span, index)
            ranges.append(range(start + own.start * unit, start + own.stop * unit))
            start += widths[span]
        return tuple(ranges)
