"""Tensor parallelism (Megatron-LM, arXiv 1909.08053, section 3): every rank computes with a share of each layer. Exact.

Attention heads and features are cut where a linear layer makes them; where the next one consumes them, the ranks add
up their parts of its output.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from ..distributed.axis import Axis
from ..weights.stored_linear import StoredLinear
from ..weights.tensor_cuts import TensorCuts


class TensorParallel:
    """Completes the outputs of a transformer's cut layers over the ranks of `axis`, which is set before each run."""

    def __init__(self, transformer: nn.Module, cuts: TensorCuts) -> None:
        self.axis: Axis | None = None
        for name, layer in transformer.named_modules():
            cut = cuts.cut_of(name)
            if cut is None or not isinstance(layer, StoredLinear):
                continue
            if cut.style == "row":
                layer.complete = self._add_up
            elif cut.style == "gathered":
                layer.complete = partial(self._gather, cuts.extents(cut, layer.out_features))

    def _add_up(self, output: Tensor) -> Tensor:
        assert self.axis is not None
        return self.axis.all_reduce(output)

    def _gather(self, extents: list[int], output: Tensor) -> Tensor:
        assert self.axis is not None
        return self.axis.all_gather(output, extents, dim=-1)
