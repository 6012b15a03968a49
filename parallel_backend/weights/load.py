"""Builds a transformer around the weights of a checkpoint."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from ..errors import UserError
from .cast_linear import CastLinear
from .checkpoint import Checkpoint, open_checkpoint
from .detect import Detected, detect
from .keymap import Piece

logger = logging.getLogger(__name__)

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WEIGHT_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}
READABLE = (*WEIGHT_DTYPES.values(), torch.float8_e5m2)


@dataclass(frozen=True)
class LoadedTransformer:
    """A diffusers transformer in eval mode without gradients.

    `bytes`: its tensors in memory; `shared_bytes`: those of them that are the file's pages, shared by all ranks of the
    host. `weight_dtype`: dtype of the matrices in memory; `compute_dtype`: what to feed the module with.
    """

    module: nn.Module
    family: str
    config: dict[str, Any]
    source: Path
    fingerprint: str
    weight_dtype: torch.dtype
    compute_dtype: torch.dtype
    bytes: int
    shared_bytes: int


def load_transformer(
    path: str | Path,
    *,
    device: torch.device | str,
    weight_dtype: str = "auto",
    keep: Callable[[Collection[str]], Collection[str]] | None = None,
) -> LoadedTransformer:
    """Loads the transformer in `path` (see `open_checkpoint`), of its parameters only those in `keep(diffusers names)`.

    On the CPU, weights already of the wanted dtype alias the mapped file; others are cast into memory of their own. On
    a GPU tensors are copied one at a time. Parameters not kept stay on the meta device. `weight_dtype`: "auto" (the
    file's own), "bf16", "fp16", "fp32" or "fp8_e4m3fn". The module computes in the weights' dtype; with fp8 weights in
    bf16 on a GPU that has it, else in fp16, and in fp32 on the CPU. Raises UserError if the file cannot serve.
    """
    device = torch.device(device)
    checkpoint = open_checkpoint(path)
    found = detect(checkpoint)
    module = _empty_module(found)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    try:
        pieces = found.pieces(expected)
    except UserError as error:
        raise UserError(f"{checkpoint.source}: {error.message}", error.hint) from error
    storage = _storage_dtype(checkpoint, found, weight_dtype)
    compute = _compute_dtype(storage, device)
    reader = _Reader(checkpoint, found.prefix, storage, compute, weight_dtype != "auto", device)
    shared = 0
    kept = pieces if keep is None else keep(pieces)
    for name in kept:
        shared += reader.assign(module, name, pieces[name])
    _move_buffers(module, device)
    module.eval().requires_grad_(False)
    size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()) if not tensor.is_meta)
    logger.info(
        "%s (%s, %s layout) from %s: weights %s, computing in %s, %.2f GB, %.2f GB of them shared file pages",
        *(found.class_name, found.family, found.layout, checkpoint.source, storage, compute, size / 1e9, shared / 1e9),
    )
    return LoadedTransformer(
        module,
        found.family,
        found.config,
        checkpoint.source,
        checkpoint.digest,
        storage,
        compute,
        size,
        shared,
    )


@dataclass(frozen=True)
class _Reader:
    """`narrow`: with fp8 storage, wider matrices of the file become fp8 too; otherwise they keep their precision."""

    checkpoint: Checkpoint
    prefix: str
    storage: torch.dtype
    compute: torch.dtype
    narrow: bool
    device: torch.device

    def assign(self, module: nn.Module, name: str, pieces: list[Piece]) -> int:
        """Gives `module` its parameter or buffer `name`; returns how many of its bytes are the file's own pages."""
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        scale = self._scale(pieces[0].scale) if pieces[0].scale else None
        raw = self._raw(pieces).to(self.device)
        stays_fp8 = self.storage in FP8 and (raw.dtype in FP8 or (self.narrow and scale is None))
        if stays_fp8 and isinstance(owner, nn.Linear) and leaf == "weight":
            tensor = raw if raw.dtype in FP8 else _cast(raw, self.storage, name)
            owner = CastLinear.from_linear(owner, scale)
            module.set_submodule(path, owner)
        else:
            tensor = _cast(raw if scale is None else raw.float() * scale, self.compute, name)
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if leaf in owner._parameters else tensor)
        return tensor.nbytes if self.checkpoint.is_mapped(tensor) else 0

    def _raw(self, pieces: list[Piece]) -> torch.Tensor:
        parts = [self.checkpoint.tensor(self.prefix + piece.key)[piece.start : piece.stop] for piece in pieces]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)

    def _scale(self, key: str) -> torch.Tensor:
        scale = self.checkpoint.tensor(self.prefix + key)
        if scale.numel() != 1 or not math.isfinite(scale.float().item()):
            raise UserError(
                f"{self.checkpoint.source}: {key} must be one finite number, is {list(scale.shape)} of {scale.dtype}."
            )
        return scale.float().reshape(()).to(self.device, copy=True)


def _empty_module(found: Detected) -> nn.Module:
    with init_empty_weights(include_buffers=False):
        return getattr(diffusers, found.class_name)(**found.config)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Buffers that no file holds (rotary tables) were computed on the CPU by the constructors."""
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to(device))


def _storage_dtype(checkpoint: Checkpoint, found: Detected, weight_dtype: str) -> torch.dtype:
    """The dtype asked for; for "auto" the one of most of the file's weights."""
    sizes: Counter[torch.dtype] = Counter()
    for key, shape in found.shapes.items():
        sizes[checkpoint.tensors[found.prefix + key].dtype] += math.prod(shape)
    unreadable = [str(dtype) for dtype in sizes if dtype not in READABLE and sizes[dtype]]
    if unreadable:
        raise UserError(
            f"{checkpoint.source} holds weights of {', '.join(unreadable)}; "
            f"readable are {', '.join(str(dtype) for dtype in READABLE)}.",
            "Use a version of the model that is not quantized that way.",
        )
    if weight_dtype == "auto":
        return sizes.most_common(1)[0][0]
    if weight_dtype not in WEIGHT_DTYPES:
        raise UserError(f"Unknown weight_dtype {weight_dtype!r}; known are auto, {', '.join(WEIGHT_DTYPES)}.")
    return WEIGHT_DTYPES[weight_dtype]


def _compute_dtype(storage: torch.dtype, device: torch.device) -> torch.dtype:
    if storage not in FP8:
        return storage
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`tensor` itself if it is of `dtype`; raises UserError where the cast would overflow."""
    limit = torch.finfo(dtype).max
    if torch.finfo(tensor.dtype).max > limit and tensor.numel():
        low, high = (value.item() for value in torch.aminmax(tensor))
        if max(-low, high) > limit:
            raise UserError(
                f"{name} holds {max(-low, high):g}, {dtype} ends at {limit:g}.", "Choose a wider weight_dtype."
            )
    return tensor.to(dtype)
