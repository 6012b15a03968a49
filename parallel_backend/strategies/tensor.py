"""Tensor parallelism (Megatron-LM, arXiv 1909.08053, section 3): every rank computes with a share of each layer. Exact.

Attention heads and features are cut where a linear layer makes them; where the next one consumes them, the ranks add
up their parts of its output. Norms over all heads add up squares.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.axis import Axis
from ..families.spec import Cut
from ..weights.stored_linear import StoredLinear
from ..weights.tensor_cuts import TensorCuts


class TensorParallel:
    """Completes what a transformer's cut layers compute over the ranks of `axis`, which is set before each run."""

    def __init__(self, transformer: nn.Module, cuts: TensorCuts) -> None:
        """Norms that are cut give way to a `NormOverRanks` with their parameters."""
        self.axis: Axis | None = None
        for name, layer in list(transformer.named_modules()):
            cut = cuts.cut_of(name)
            if cut is None:
                continue
            if cut.style == "norm":
                transformer.set_submodule(name, NormOverRanks(layer, cut, cuts, self.add_up))
            elif cut.style == "row" and isinstance(layer, StoredLinear):
                layer.complete = self.add_up
            elif cut.style == "gathered" and isinstance(layer, StoredLinear):
                layer.complete = partial(self._gather, cuts.extents(cut, layer.out_features))

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks, in its place."""
        assert self.axis is not None
        return self.axis.all_reduce(x)

    def _gather(self, extents: list[int], output: Tensor) -> Tensor:
        assert self.axis is not None
        return self.axis.all_gather(output, extents, dim=-1)


class NormOverRanks(nn.Module):
    """A root mean square norm over the heads of all ranks, of which each normalises its own, `[..., own heads * D]`.

    `weight` is cut as the heads are. Squares are added up in fp32, those of a head that several ranks have once.
    """

    def __init__(self, norm: Any, cut: Cut, cuts: TensorCuts, add_up: Callable[[Tensor], Tensor]) -> None:
        """Replaces `norm`, with its weight and `eps`."""
        super().__init__()
        (group,), heads = cut.spans, cuts.heads
        self.weight = norm.weight
        self.eps: float | None = norm.eps
        self.width = heads.count(group) * heads.dim(group)
        own, counted = heads.own(group), heads.counted(group)
        self.counted = slice(*((end - own.start) * heads.dim(group) for end in (counted.start, counted.stop)))
        self._add_up = add_up

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        squares = self._add_up(wide[..., self.counted].square().sum(-1, keepdim=True))
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        normed = wide * torch.rsqrt(squares / self.width + eps)
        return (normed if self.weight is None else normed * self.weight.float()).to(x.dtype)
