"""Reads the parameters of a module from the tensors of a checkpoint, in the formats that memory keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files.checkpoint import Checkpoint
from ..files.key_map import Piece
from .formats import BY_DTYPE, StorageFormat
from .stored_linear import StoredLinear
from .tensor_cuts import Slices


@dataclass(frozen=True)
class StoredTensor:
    """A parameter or buffer `name` as it is to be in memory: `slices` of the file's `pieces`, or all of them.

    `source`: how the file stores it; `format`: how memory does. `is_kept`: memory has the file's own numbers, with
    their `companions`; otherwise they are decoded.
    """

    name: str
    pieces: list[Piece]
    slices: Slices | None
    shape: tuple[int, ...]
    source: StorageFormat
    format: StorageFormat
    companions: dict[str, Tensor]
    is_kept: bool

    @property
    def bytes(self) -> int:
        return self.format.bytes(self.shape)

    def assign(self, module: nn.Module, tensor: Tensor) -> None:
        """Give `module` its parameter or buffer. A linear layer's numbers of features stay those of the whole layer."""
        path, _, leaf = self.name.rpartition(".")
        owner = module.get_submodule(path)
        if isinstance(owner, StoredLinear) and leaf == "weight":
            owner.store(tensor, self.format, self.companions if self.is_kept else {})
        else:
            setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if leaf in owner._parameters else tensor)


@dataclass(frozen=True)
class Reader:
    """`storage`: the format for the matrices of linear layers; `compute`: the plain one that the others become.

    `narrow`: plain matrices of the file become one of a `storage` that is not plain, too; otherwise they keep their
    precision. `plain`: how the names of modules begin whose matrices are always plain. `check_cancelled` is called
    before each tensor is read.
    """

    checkpoint: Checkpoint
    prefix: str
    storage: StorageFormat
    compute: StorageFormat
    narrow: bool
    plain: tuple[str, ...]
    device: torch.device
    check_cancelled: Callable[[], None] = lambda: None

    def entry(self, module: nn.Module, name: str, pieces: list[Piece], slices: Slices | None) -> StoredTensor:
        """What `module`'s parameter or buffer `name` becomes. Raises UserError for an fp8 factor that cannot be one."""
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        source = BY_DTYPE[self.checkpoint.tensors[self.prefix + pieces[0].key].dtype]
        shape = list(getattr(owner, leaf).shape)
        if slices:
            shape[slices.dim] = slices.extent
        format = self.compute
        if isinstance(owner, StoredLinear) and leaf == "weight" and not name.startswith(self.plain):
            format = self._format_of_matrix(source, bool(pieces[0].companions))
        is_kept = source is format and not (format.is_plain and pieces[0].companions)
        dtype = self.compute.dtype if is_kept else torch.float32
        companions = {role: self._number(key).to(dtype) for role, key in pieces[0].companions.items()}
        return StoredTensor(name, pieces, slices, tuple(shape), source, format, companions, is_kept)

    def read(self, entry: StoredTensor) -> Tensor:
        """The tensor of `entry`, on the device. On the CPU a view of the file where that has it as it is to be.

        Columns are copied: their pages in the file hold the other ranks' columns too.
        """
        self.check_cancelled()
        raw = self._raw(entry)
        return self._convert(raw if entry.slices is None or entry.slices.dim == 0 else raw.contiguous(), entry)

    def read_flat(self, entry: StoredTensor, start: int, stop: int) -> Tensor:
        """The numbers `[start, stop)` of the tensor of `entry`, row by row, on the device."""
        self.check_cancelled()
        return self._convert(self._raw(entry).reshape(-1)[start:stop], entry)

    def _format_of_matrix(self, source: StorageFormat, has_companions: bool) -> StorageFormat:
        if self.storage.is_plain:
            return self.compute
        if not source.is_plain:
            return source
        return self.storage if self.narrow and not has_companions else self.compute

    def _convert(self, stored: Tensor, entry: StoredTensor) -> Tensor:
        stored = stored.to(self.device)
        if entry.is_kept:
            return stored
        if not entry.source.is_plain or entry.companions:
            stored = entry.source.dequantise(stored, entry.companions, torch.float32)
        return _cast(stored, entry.format.dtype, entry.name)

    def _raw(self, entry: StoredTensor) -> Tensor:
        parts = [self.checkpoint.tensor(self.prefix + piece.key)[piece.start : piece.stop] for piece in entry.pieces]
        whole = parts[0]
        if len(parts) > 1:
            whole = torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
        return entry.source.read(whole, entry.slices)

    def _number(self, key: str) -> Tensor:
        number = self.checkpoint.tensor(self.prefix + key)
        if number.numel() != 1 or not math.isfinite(number.float().item()):
            raise UserError(
                f"{self.checkpoint.source}: {key} must be one finite number, is {list(number.shape)} of {number.dtype}."
            )
        return number.float().reshape(()).to(self.device, copy=True)


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
