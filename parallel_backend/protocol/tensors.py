"""Tensors as a safetensors body, without copies: the sender writes the tensors' own memory, the receiver's tensors
are views of the received buffer. (The library's `save` and `load` copy every byte two times on each side.)"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .errors import ProtocolError

if TYPE_CHECKING:
    import torch

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
NAMES = {f"torch.{dtype}": name for name, dtype in DTYPES.items()}
MAX_TENSORS = 4096
MAX_NUMBERS = 1 << 40
"""Of a tensor; where it is empty, the product of its other dims: torch takes no shape whose strides overflow."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dtype: str
    shape: tuple[int, ...] = Field(max_length=16)
    data_offsets: tuple[int, int]


_HEADER = TypeAdapter(dict[str, _Entry])


class Body(NamedTuple):
    """`buffers`, one after another, are a safetensors file of `size` bytes."""

    size: int
    buffers: list[memoryview]


def pack(tensors: Mapping[str, torch.Tensor]) -> Body:
    """Tensors (of any device) as one safetensors file, largest items first so that every tensor is aligned."""
    if not tensors:
        return Body(0, [])
    import torch

    entries: dict[str, object] = {}
    buffers: list[memoryview] = []
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        # A tensor of one value is contiguous whatever its stride; as bytes it needs one.
        raw = flat.as_strided(flat.shape, (1,)).view(torch.uint8)
        entries[name] = {
            "dtype": NAMES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + raw.numel()],
        }
        at += raw.numel()
        buffers.append(raw.numpy().data)
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    prefix = len(header).to_bytes(8, "little") + header
    return Body(len(prefix) + at, [memoryview(prefix), *buffers])


def unpack(body: bytearray) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, as views of `body`. Raises `ProtocolError` where the file is malformed."""
    if not body:
        return {}
    header_size = int.from_bytes(body[:8], "little")
    if len(body) < 8 or header_size > len(body) - 8:
        raise ProtocolError(f"The tensor body of {len(body)} bytes is cut short in its header.")
    try:
        entries = _HEADER.validate_json(bytes(body[8 : 8 + header_size]))
    except ValidationError as error:
        first = error.errors()[0]
        raise ProtocolError(f"The tensor body has a malformed header: {first['msg']}.") from error
    if len(entries) > MAX_TENSORS:
        raise ProtocolError(f"The tensor body holds {len(entries)} tensors; at most {MAX_TENSORS} are allowed.")
    base = 8 + header_size
    for name, entry in entries.items():
        _check(name, entry, len(body) - base)
    _check_overlaps(entries)
    return {name: _view(entry, body, base) for name, entry in entries.items()}


def _check(name: str, entry: _Entry, size: int) -> None:
    import torch

    if entry.dtype not in DTYPES:
        raise ProtocolError(f"Tensor {name!r} has the unknown dtype {entry.dtype!r}.")
    start, end = entry.data_offsets
    if min(entry.shape, default=0) < 0 or not 0 <= start <= end <= size:
        raise ProtocolError(f"Tensor {name!r} does not lie inside its body.")
    if prod(max(1, dim) for dim in entry.shape) > MAX_NUMBERS:
        raise ProtocolError(f"Tensor {name!r} has the shape {_short(entry.shape)}, beyond {MAX_NUMBERS} numbers.")
    if end - start != prod(entry.shape) * getattr(torch, DTYPES[entry.dtype]).itemsize:
        raise ProtocolError(f"Tensor {name!r} of shape {list(entry.shape)} and {entry.dtype} has {end - start} bytes.")


def _check_overlaps(entries: Mapping[str, _Entry]) -> None:
    """Tensors that share bytes would take more memory than was sent: those that are not aligned are copied."""
    spans = sorted(
        (each.data_offsets, name) for name, each in entries.items() if each.data_offsets[0] < each.data_offsets[1]
    )
    for ((_, end), before), ((start, _), name) in pairwise(spans):
        if start < end:
            raise ProtocolError(f"The tensors {before!r} and {name!r} overlap.")


def _view(entry: _Entry, body: bytearray, base: int) -> torch.Tensor:
    import torch

    dtype = getattr(torch, DTYPES[entry.dtype])
    start, end = entry.data_offsets
    if start == end:
        return torch.empty(entry.shape, dtype=dtype)
    if (base + start) % dtype.itemsize:
        return torch.frombuffer(body[base + start : base + end], dtype=dtype).reshape(entry.shape)
    count = prod(entry.shape)
    return torch.frombuffer(body, dtype=dtype, count=count, offset=base + start).reshape(entry.shape)


def _short(shape: tuple[int, ...]) -> str:
    """The shape, where its numbers are not longer than anybody reads."""
    text = str(list(shape))
    return text if len(text) <= 200 else f"{text[:200]} …"
