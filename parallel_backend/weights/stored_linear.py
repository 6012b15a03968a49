"""The linear layer of loaded models, whatever format its weight is stored in, and the seat of what adapts it."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .formats import BY_DTYPE, Companions, StorageFormat


class Adapter(Protocol):
    """Computes in the place of a layer, which it is given, until it is taken off."""

    def __call__(self, layer: StoredLinear, x: Tensor) -> Tensor: ...


class StoredLinear(nn.Linear):
    """Keeps its weight as `format` stores it, and computes in its input's dtype.

    Its buffers are the companions of the weight. `in_features` and `out_features` are those of the whole layer, also
    where a rank holds a part. `adapter` is what LoRAs put on; hooks come behind it, and so the ranks of a cut layer
    add up its adapted outputs. It is no module and no hook: `torch.compile` looks at an attribute anew at every call,
    and at hooks never again.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Takes over the parameters of `linear`, one of a plain format."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.format = BY_DTYPE[linear.weight.dtype]
        self.adapter: Adapter | None = None

    def store(self, weight: Tensor, format: StorageFormat, companions: Companions) -> None:
        """Compute with this weight, as `format` stores it, from now on."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.format = format
        for name, tensor in companions.items():
            self.register_buffer(name, tensor)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """`[out, in]`: what it multiplies inputs of `dtype` with."""
        if self.format.is_plain:
            return self.weight
        return self.format.dequantise(self.weight, self._buffers, dtype)

    def product(self, x: Tensor) -> Tensor:
        """The layer's output `[..., out]` without its adapter."""
        return F.linear(x, self.matrix(x.dtype), self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input) if self.adapter is None else self.adapter(self, input)


def store_linears(module: nn.Module) -> None:
    """Make every linear layer within `module` a `StoredLinear`."""
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Linear:
            module.set_submodule(name, StoredLinear(layer))
