"""Builds a transformer, or a part of one, around the weights of a checkpoint."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from ..errors import UserError
from ..families.registry import load_class
from ..families.spec import FamilySpec, Shapes
from ..files.checkpoint import Checkpoint, open_checkpoint
from ..files.detect import Detected, detect
from ..layout.model_part import WHOLE, ModelPart
from ..layout.stages import BlockList, block_of, block_parameters, stage_parameters
from .formats import BY_DTYPE, BY_NAME, StorageFormat
from .reader import Reader, StoredTensor
from .shards import BlockShards, load_shards
from .stored_linear import store_linears
from .tensor_cuts import TensorCuts

logger = logging.getLogger(__name__)

WEIGHT_DTYPES = ("bf16", "fp16", "fp32", "fp8_e4m3fn")
"""The formats that a user may ask for."""


@dataclass(frozen=True)
class LoadedTransformer:
    """A diffusers transformer in eval mode without gradients.

    `bytes`: its tensors in memory; `shared_bytes`: those of them that are the file's pages, shared by all ranks of the
    host. `weight_dtype`: dtype of the matrices in memory; `compute_dtype`: what to feed the module with. `cuts`: what
    its layers hold; `shards`: its blocks, where they are put together only while they are computed.
    `block_parameters`: how many parameters each block of the whole model has. `shapes`: its parameters, and those
    buffers that files hold, whole, as diffusers names them.
    """

    module: nn.Module
    spec: FamilySpec
    config: dict[str, Any]
    source: Path
    weight_dtype: torch.dtype
    compute_dtype: torch.dtype
    bytes: int
    shared_bytes: int
    cuts: TensorCuts
    shards: BlockShards | None
    block_parameters: tuple[int, ...]
    shapes: Shapes

    @property
    def family(self) -> str:
        return self.spec.name


def load_transformer(
    path: str | Path,
    *,
    device: torch.device | str,
    weight_dtype: str = "auto",
    part: ModelPart = WHOLE,
    check_cancelled: Callable[[], None] = lambda: None,
) -> LoadedTransformer:
    """Loads the transformer in `path` (see `open_checkpoint`), of its parameters only those of `part`.

    On the CPU, weights already of the wanted dtype alias the mapped file; others are cast into memory of their own. On
    a GPU tensors are copied one at a time. Parameters of other parts stay on the meta device. `weight_dtype`: "auto"
    (the file's own), "bf16", "fp16", "fp32" or "fp8_e4m3fn". The module computes in the weights' dtype; with fp8
    weights in bf16 on a GPU that has it, else in fp16, and in fp32 on the CPU. `check_cancelled` is called before each
    tensor is read. Raises UserError if the file cannot serve.
    """
    device = torch.device(device)
    checkpoint = open_checkpoint(path)
    found = detect(checkpoint)
    module = empty_module(found.spec.class_name, found.config)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    try:
        pieces = found.pieces(expected)
    except UserError as error:
        raise UserError(f"{checkpoint.source}: {error.message}", error.hint) from error
    store_linears(module)
    storage = _storage_format(checkpoint, found, weight_dtype)
    compute = _compute_format(storage, device)
    narrow = weight_dtype != "auto"
    reader = Reader(
        checkpoint,
        found.prefix,
        storage,
        compute,
        narrow,
        found.spec.never_fp8,
        device,
        check_cancelled=check_cancelled,
    )
    if part.tensor.count > 1 and not found.spec.cuts:
        raise UserError(
            f"{checkpoint.source}: a {found.family} model cannot be cut over tensor_degree={part.tensor.count} ranks.",
            "Use tensor_degree=1, and ulysses_degree or weights=sharded instead.",
        )
    cuts = TensorCuts(found.spec.cuts, found.spec.heads, found.config, part.tensor)
    entries = []
    for name in sorted(stage_parameters(expected, found.spec.blocks, part.stage)):
        if cuts.holds(name):
            entries.append(reader.entry(module, name, pieces[name], cuts.slices(name, expected[name])))
        else:
            _drop(module, name)
    blocks = _by_block(entries, found.spec.blocks) if part.shard else []
    in_blocks = {entry.name for block in blocks for entry in block}
    shared = sum(_load(entry, module, reader) for entry in entries if entry.name not in in_blocks)
    shards = load_shards(blocks, module, reader, part.shard, in_host_memory=part.offload) if part.shard else None
    _move_buffers(module, device)
    module.eval().requires_grad_(False)
    tensors = (*module.named_parameters(), *module.named_buffers())
    size = sum(tensor.nbytes for name, tensor in tensors if not tensor.is_meta and name not in in_blocks)
    size += shards.bytes if shards else 0
    logger.info(
        "%s (%s, %s layout) from %s: weights %s, computing in %s, %.2f GB, %.2f GB of them shared file pages",
        *(
            found.spec.class_name,
            found.family,
            found.layout,
            checkpoint.source,
            storage.name,
            compute.name,
            size / 1e9,
            shared / 1e9,
        ),
    )
    return LoadedTransformer(
        module,
        found.spec,
        found.config,
        checkpoint.source,
        storage.dtype,
        compute.dtype,
        size,
        shared,
        cuts,
        shards,
        tuple(block_parameters(expected, found.spec.blocks).values()),
        expected,
    )


def empty_module(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """All of it on the meta device, but for the buffers that no file holds: the constructor computes these.

    `class_name`: as in `FamilySpec`.
    """
    build = load_class(class_name) if ":" in class_name else getattr(diffusers, class_name)
    with torch.device("meta"):
        module = build(**config)
    if all(name in module.state_dict() for name, _ in module.named_buffers()):
        return module
    with init_empty_weights(include_buffers=False):
        return build(**config)


def _by_block(entries: Sequence[StoredTensor], lists: Sequence[BlockList]) -> list[list[StoredTensor]]:
    """The entries of each block, in the order of computation."""
    blocks: dict[tuple[int, int], list[StoredTensor]] = {}
    for entry in entries:
        if place := block_of(entry.name, lists):
            blocks.setdefault(place, []).append(entry)
    return [blocks[place] for place in sorted(blocks)]


def _load(entry: StoredTensor, module: nn.Module, reader: Reader) -> int:
    """Gives `module` the tensor of `entry`; returns how many of its bytes are the file's own pages."""
    tensor = reader.read(entry)
    entry.assign(module, tensor)
    return tensor.nbytes if reader.checkpoint.is_mapped(tensor) else 0


def _drop(module: nn.Module, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, None)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Buffers that no file holds (rotary tables) were computed on the CPU by the constructors."""
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if not buffer.is_meta:
                setattr(owner, name, buffer.to(device))


def _storage_format(checkpoint: Checkpoint, found: Detected, weight_dtype: str) -> StorageFormat:
    """The format asked for; for "auto" the one of most of the file's weights."""
    sizes: Counter[torch.dtype] = Counter()
    for key, shape in found.shapes.items():
        sizes[checkpoint.tensors[found.prefix + key].dtype] += math.prod(shape)
    unreadable = [str(dtype) for dtype in sizes if dtype not in BY_DTYPE and sizes[dtype]]
    if unreadable:
        raise UserError(
            f"{checkpoint.source} holds weights of {', '.join(unreadable)}; "
            f"readable are {', '.join(str(dtype) for dtype in BY_DTYPE)}.",
            "Use a version of the model that is not quantized that way.",
        )
    if weight_dtype == "auto":
        return BY_DTYPE[sizes.most_common(1)[0][0]]
    if weight_dtype not in WEIGHT_DTYPES:
        raise UserError(f"Unknown weight_dtype {weight_dtype!r}; known are auto, {', '.join(WEIGHT_DTYPES)}.")
    return BY_NAME[weight_dtype]


def _compute_format(storage: StorageFormat, device: torch.device) -> StorageFormat:
    """The plain format to compute in."""
    if storage.is_plain:
        return storage
    if device.type != "cuda":
        return BY_NAME["fp32"]
    return BY_NAME["bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"]
