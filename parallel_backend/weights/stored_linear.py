"""A linear layer whose weight stays fp8 in memory."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class CastLinear(nn.Linear):
    """Casts its fp8 weight to the input's dtype at each call, times `weight_scale` (a scalar) where there is one.

    As ComfyUI does without fp8 matrix units, with one difference: ComfyUI scales either the weight or the input,
    whichever is smaller; here it is always the weight, so that the tokens on a rank never change the rounding.
    """

    weight_scale: torch.Tensor | None

    @classmethod
    def from_linear(cls, linear: nn.Linear, weight_scale: torch.Tensor | None) -> CastLinear:
        """Takes over the parameters of `linear`."""
        cast = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        cast.weight, cast.bias = linear.weight, linear.bias
        cast.register_buffer("weight_scale", weight_scale)
        return cast

    def weight_as(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix that it multiplies inputs of `dtype` with."""
        weight = self.weight.to(dtype)
        return weight if self.weight_scale is None else weight * self.weight_scale.to(dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight_as(input.dtype), self.bias)
