"""The linear layer of loaded models, whatever format its weight is in, with seats for what changes its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .formats import BY_DTYPE, Companions, StorageFormat


class Adapter(Protocol):
    """Computes in the place of a layer, whose input is `x`, until it is taken off."""

    def __call__(self, layer: StoredLinear, x: Tensor) -> Tensor: ...


class StoredLinear(nn.Linear):
    """Keeps its weight as `format` stores it, and computes in its input's dtype.

    Its buffers are the companions of the weight. `in_features` and `out_features` are those of the whole layer, also
    where a rank holds a part. `adapter` is what LoRAs put on. `complete` makes the output of a cut layer whole over the
    tensor-parallel ranks; it comes last, so that they add up what is adapted.

    Both are plain attributes: `torch.compile` looks at these at every call, and at a module's hooks once.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Takes over the parameters of `linear`, one of a plain format."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.format = BY_DTYPE[linear.weight.dtype]
        self.adapter: Adapter | None = None
        self.complete: Callable[[Tensor], Tensor] | None = None

    def store(self, weight: Tensor, format: StorageFormat, companions: Companions) -> None:
        """Compute with this weight, as `format` stores it, from now on."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.format = format
        for name, tensor in companions.items():
            self.register_buffer(name, tensor)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The matrix `[out, in]` that multiplies inputs of `dtype`."""
        if self.format.is_plain:
            return self.weight
        return self.format.dequantise(self.weight, self._buffers, dtype)

    def product(self, x: Tensor) -> Tensor:
        """The layer's own output, without changes, `[..., out]`."""
        return F.linear(x, self.matrix(x.dtype), self.bias)

    def forward(self, input: Tensor) -> Tensor:
        output = self.product(input) if self.adapter is None else self.adapter(self, input)
        return output if self.complete is None else self.complete(output)


def store_linears(module: nn.Module) -> None:
    """Make every linear layer within `module` a `StoredLinear`."""
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Linear:
            module.set_submodule(name, StoredLinear(layer))
