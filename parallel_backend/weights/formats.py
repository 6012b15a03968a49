"""How the elements of a weight are stored, in files and in memory: one row a format.

A format that is new needs a row here, the names of its companions in the key map, and nothing else: its cuts, shares
of bytes, stages and LoRAs are those of every other. Formats of blocks (GGUF, int8 with a factor for each row) have a
granule, units and a decoder of their own. Where hardware multiplies with a format as it is stored (fp8 matrix units),
that product belongs next to the decoder, and `StoredLinear.product` is its one caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .tensor_cuts import Slices

Companions = Mapping[str, Tensor | None]
"""The tensors that a stored weight needs to be read, by what they are; "weight_scale" is its factor, one number."""


def scaled(stored: Tensor, companions: Companions, dtype: torch.dtype) -> Tensor:
    """Every element is a floating point number, times the factor where there is one.

    ComfyUI scales either the weight or the input, whichever is smaller; here it is always the weight, so that the
    tokens on a rank never change the rounding.
    """
    values, scale = stored.to(dtype), companions.get("weight_scale")
    return values if scale is None else values * scale.to(dtype)


@dataclass(frozen=True)
class StorageFormat:
    """Each `granule` elements of a row are `units` numbers of `dtype`, side by side. No cut parts a granule.

    `is_plain`: whether torch multiplies with it as it is stored. `decode`: see `dequantise`.
    """

    name: str
    dtype: torch.dtype
    is_plain: bool
    granule: int = 1
    units: int = 1
    decode: Callable[[Tensor, Companions, torch.dtype], Tensor] = scaled

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape in which a weight `[..., columns]` is stored."""
        return (*shape[:-1], *(columns // self.granule * self.units for columns in shape[-1:]))

    def bytes(self, shape: Sequence[int]) -> int:
        """What a weight `[..., columns]` takes."""
        return math.prod(self.stored_shape(shape)) * self.dtype.itemsize

    def read(self, stored: Tensor, slices: Slices | None) -> Tensor:
        """The part `slices` of a stored weight, as it is stored. Raises `UserError` if they part a granule."""
        if slices is None:
            return stored
        if slices.dim == stored.ndim - 1 and (self.granule, self.units) != (1, 1):
            slices = Slices(slices.dim, tuple(self._places(part) for part in slices.ranges))
        return slices.of(stored)

    def dequantise(self, stored: Tensor, companions: Companions, dtype: torch.dtype) -> Tensor:
        """The weight that `stored` stands for, in `dtype`."""
        return self.decode(stored, companions, dtype)

    def _places(self, columns: range) -> range:
        if columns.start % self.granule or columns.stop % self.granule:
            raise UserError(
                f"A rank would hold the columns {columns.start} to {columns.stop} of a matrix that is stored as "
                f"{self.name}, in groups of {self.granule}.",
                "Use a smaller tensor_degree, or weights=sharded instead.",
            )
        return range(*(place // self.granule * self.units for place in (columns.start, columns.stop)))


FORMATS = (
    StorageFormat("bf16", torch.bfloat16, is_plain=True),
    StorageFormat("fp16", torch.float16, is_plain=True),
    StorageFormat("fp32", torch.float32, is_plain=True),
    StorageFormat("fp8_e4m3fn", torch.float8_e4m3fn, is_plain=False),
    StorageFormat("fp8_e5m2", torch.float8_e5m2, is_plain=False),
)
BY_DTYPE = {each.dtype: each for each in FORMATS}
"""The format of a tensor of a file that names no other."""
BY_NAME = {each.name: each for each in FORMATS}
