"""From the tensors of a checkpoint to the parameters of a module, in the dtypes that they are kept in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files.checkpoint import Checkpoint
from ..files.key_map import Piece
from .stored_linear import CastLinear
from .tensor_cuts import Slices

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Entry:
    """A parameter or buffer `name` as it is to be in memory: `slices` of the file's `pieces`, or all of them.

    `scale`: the factor of an fp8 matrix that stays one (`casts`), or that is multiplied in.
    """

    name: str
    pieces: list[Piece]
    slices: Slices | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: Tensor | None
    casts: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def assign(self, module: nn.Module, tensor: Tensor) -> None:
        """Give `module` its parameter or buffer. A linear layer's numbers of features stay those of the whole layer."""
        path, _, leaf = self.name.rpartition(".")
        owner = module.get_submodule(path)
        if self.casts:
            assert isinstance(owner, nn.Linear)
            owner = CastLinear.from_linear(owner, self.scale)
            module.set_submodule(path, owner)
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if leaf in owner._parameters else tensor)


@dataclass(frozen=True)
class Reader:
    """`narrow`: with fp8 storage, wider matrices of the file become fp8 too; otherwise they keep their precision."""

    checkpoint: Checkpoint
    prefix: str
    storage: torch.dtype
    compute: torch.dtype
    narrow: bool
    never_fp8: tuple[str, ...]
    device: torch.device

    def entry(self, module: nn.Module, name: str, pieces: list[Piece], slices: Slices | None) -> Entry:
        """What `module`'s parameter or buffer `name` becomes. Raises UserError for an fp8 factor that cannot be one."""
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        found = self.checkpoint.tensors[self.prefix + pieces[0].key].dtype
        scale = self._scale(pieces[0].scale) if pieces[0].scale else None
        stays_fp8 = (
            self.storage in FP8
            and (found in FP8 or (self.narrow and scale is None))
            and not name.startswith(self.never_fp8)
        )
        casts = stays_fp8 and isinstance(owner, nn.Linear) and leaf == "weight"
        dtype = (found if found in FP8 else self.storage) if casts else self.compute
        shape = list(getattr(owner, leaf).shape)
        if slices:
            shape[slices.dim] = slices.extent
        return Entry(name, pieces, slices, tuple(shape), dtype, scale, casts)

    def read(self, entry: Entry) -> Tensor:
        """The tensor of `entry`, on the device. On the CPU a view of the file where that has it as it is to be.

        Columns are copied: their pages in the file hold the other ranks' columns too.
        """
        raw = self._raw(entry)
        return self._convert(raw if entry.slices is None or entry.slices.dim == 0 else raw.contiguous(), entry)

    def read_flat(self, entry: Entry, start: int, stop: int) -> Tensor:
        """The elements `[start, stop)` of the tensor of `entry`, row by row, on the device."""
        return self._convert(self._raw(entry).reshape(-1)[start:stop], entry)

    def _convert(self, raw: Tensor, entry: Entry) -> Tensor:
        raw = raw.to(self.device)
        if entry.scale is not None and not entry.casts:
            raw = raw.float() * entry.scale
        return _cast(raw, entry.dtype, entry.name)

    def _raw(self, entry: Entry) -> Tensor:
        parts = [self.checkpoint.tensor(self.prefix + piece.key)[piece.start : piece.stop] for piece in entry.pieces]
        whole = parts[0]
        if len(parts) > 1:
            whole = torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
        return whole if entry.slices is None else entry.slices.of(whole)

    def _scale(self, key: str) -> Tensor:
        scale = self.checkpoint.tensor(self.prefix + key)
        if scale.numel() != 1 or not math.isfinite(scale.float().item()):
            raise UserError(
                f"{self.checkpoint.source}: {key} must be one finite number, is {list(scale.shape)} of {scale.dtype}."
            )
        return scale.float().reshape(()).to(self.device, copy=True)


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` itself if it is of `dtype`; raises UserError where the cast would overflow."""
    limit = torch.finfo(dtype).max
    if torch.finfo(tensor.dtype).max > limit and tensor.numel():
        low, high = (value.item() for value in torch.aminmax(tensor))
        if max(-low, high) > limit:
            raise UserError(
                f"{name} holds {max(-low, high):g}, {dtype} ends at {limit:g}.", "Choose a wider weight_dtype."
            )
    return tensor.to(dtype)
