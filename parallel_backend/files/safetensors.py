"""Reads and validates the header of a safetensors file, and says what a file is that is not one.

Format: 8 bytes little-endian length N, N bytes of JSON `{name: {dtype, shape, data_offsets}}`, then the tensors' bytes,
which must tile the rest of the file. See the safetensors README, section "Format".
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .regular import open_regular

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_TENSORS = 30_000
"""A larger header would keep all ranks busy for seconds. Of the families and their neighbours LTX-2's network has most,
3,510 (HunyuanVideo 1,264, Wan 14B 1,095, all of an SDXL checkpoint 2,641); scales and marks of a quantized file make at
most four of one, as a LoRA makes up to three of each matrix."""
REDOWNLOAD = "Download or copy it again."
CONVERT = "Use the safetensors version of this model."
GGUF = "The ranks do not read its blocks. Use the model's bf16 or fp8 .safetensors file; fp8 is as large as Q8."
UNREAD_SUFFIXES = {
    ".gguf": ("a GGUF file", GGUF),
    **dict.fromkeys((".ckpt", ".pt", ".pth", ".bin"), ("a pickled PyTorch file, which may run any program", CONVERT)),
}
"""Of files of weights that are never read: what such a file is, what to do."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

FOREIGN = (  # first bytes in lower case, what such a file is, what to do
    (b"pk\x03\x04", "a zip archive, probably a pickled PyTorch checkpoint (.ckpt, .pt, .bin)", CONVERT),
    *((bytes([0x80, version]), "a Python pickle (.ckpt, .pt, .bin)", CONVERT) for version in (2, 3, 4, 5)),
    (b"gguf", *UNREAD_SUFFIXES[".gguf"]),
    (b"\x89hdf", "an HDF5 file", CONVERT),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to", "Run `git lfs pull`."),
    (b"<!doctype", "an HTML page, probably the error page of a failed download", REDOWNLOAD),
    (b"<html", "an HTML page, probably the error page of a failed download", REDOWNLOAD),
    (b"<?xml", "an XML document, probably the error page of a failed download", REDOWNLOAD),
    (b"{", "a JSON text, probably the error reply of a failed download", REDOWNLOAD),
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its place (bytes `[start, end)` of the file) and how to read it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Header of the safetensors file `path`; raises UserError for a missing, truncated or foreign file."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(64), size)
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error.strerror}. Expected a safetensors file.", "Check the path and its permissions."
        ) from error
    return _parse(path, raw, size)


def _header_length(path: Path, start: bytes, size: int) -> int:
    """Length in bytes of the header that a file of `size` bytes beginning with `start` claims, once it is plausible."""
    length = int.from_bytes(start[:8], "little")
    if size < 10 or not 2 <= length <= MAX_HEADER_BYTES or start[8:9] != b"{":
        for magic, what, hint in FOREIGN:
            if start.lstrip().lower().startswith(magic):
                raise UserError(f"{path} is not a safetensors file: it is {what}.", hint)
        if size < 10:
            raise UserError(f"{path} is not a safetensors file: it has {size} bytes, expected at least 10.", REDOWNLOAD)
        raise _foreign(path, "its first bytes are no safetensors header")
    if 8 + length > size:
        raise UserError(
            f"{path} is truncated: its header alone needs {8 + length} bytes, the file has {size}.", REDOWNLOAD
        )
    return length


def _parse(path: Path, raw: bytes, size: int) -> Header:
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _foreign(path, f"its header is not valid JSON ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise _foreign(path, "its header is not a JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _foreign(path, "its __metadata__ is not a table of strings")
    data_start = 8 + len(raw)
    if len(content) > MAX_TENSORS:
        raise UserError(f"{path} holds {len(content)} tensors; no model has more than {MAX_TENSORS}.", "Use another.")
    tensors = {name: _tensor_info(path, name, entry, data_start) for name, entry in content.items()}
    _check_tiling(path, tensors, data_start, size)
    return Header(tensors, metadata)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _foreign(path, f"the entry of {name!r} is not made of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(
            f"{path}: tensor {name!r} has the dtype {dtype!r}; known are {', '.join(DTYPES)}.", "Use another version."
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _foreign(path, f"shape or data_offsets of {name!r} are not lists of whole numbers of 0 or more")
    start, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != needed:
        raise _foreign(path, f"{name!r} needs {needed} bytes by its shape, its data_offsets give it {end - start}")
    return TensorInfo(path, DTYPES[dtype], tuple(shape), data_start + start, data_start + end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def _check_tiling(path: Path, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    """The tensors' byte ranges follow each other without gap or overlap, from the header's end to the file's end."""
    position = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            fault = "overlaps the tensor before it" if info.start < position else "leaves a gap before it"
            raise _foreign(path, f"the data of {name!r} {fault}")
        position = info.end
    if size < position:
        raise UserError(f"{path} is truncated: its header needs {position} bytes, the file has {size}.", REDOWNLOAD)
    if size > position:
        raise UserError(f"{path} is damaged: its header needs {position} bytes, the file has {size}.", REDOWNLOAD)


def _foreign(path: Path, why: str) -> UserError:
    return UserError(f"{path} is not a valid safetensors file: {why}.", REDOWNLOAD)
