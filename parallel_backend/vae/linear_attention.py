"""The linear attention of SANA's autoencoder over all pixels of a picture that is cut into bands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.attention_processor import SanaMultiscaleAttnProcessor2_0, SanaMultiscaleLinearAttention
from torch import Tensor, nn

from ..attention.linear import attend
from ..distributed.axis import Axis


class SummedAttention:
    """An attention module whose keys and values are summed over the ranks of `axis`; all else is the module's own."""

    def __init__(self, module: SanaMultiscaleLinearAttention, axis: Axis) -> None:
        self._module = module
        self._axis = axis

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def apply_linear_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(self._axis, self._module.eps, query, key, value)

    apply_quadratic_attention = apply_linear_attention
    """Two orders of the same products. The class chooses by the number of pixels, here by that of a band."""


class SummedProcessor:
    """The attention processor of diffusers over the bands of all ranks of `axis`."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self._process = SanaMultiscaleAttnProcessor2_0()

    def __call__(self, module: SanaMultiscaleLinearAttention, x: Tensor) -> Tensor:
        return self._process(SummedAttention(module, self._axis), x)  # pyright: ignore[reportArgumentType]


@contextmanager
def summed_linear_attention(module: nn.Module, axis: Axis) -> Iterator[None]:
    """While it is entered, the attention in `module` sums keys and values over the bands of all ranks of `axis`."""
    processors: dict[Any, Any] = {
        part: part.processor for part in module.modules() if isinstance(part, SanaMultiscaleLinearAttention)
    }
    for part in processors:
        part.processor = SummedProcessor(axis)
    try:
        yield
    finally:
        for part, processor in processors.items():
            part.processor = processor
