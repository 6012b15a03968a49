"""In which quantized formats a checkpoint is. Only ComfyUI's scaled fp8 is read, with one factor for a matrix."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from ..errors import UserError
from .checkpoint import Checkpoint

READ = ("float8_e4m3fn", "float8_e5m2")
"""The readable ones of the formats that ComfyUI's files have named since 2026, layer by layer, in tensors or in the
header's metadata."""
FORMAT = "comfy_quant"
METADATA = "_quantization_metadata"
OTHERS = (
    (re.compile(r"\.quant_state\.bitsandbytes__|\.weight\.absmax$"), "bitsandbytes"),
    (re.compile(r"\.(qweight|wscales|wtscale|qzeros)$"), "SVDQuant (Nunchaku), GPTQ or AWQ"),
)
"""Formats by the keys that only their files have."""


def refuse_unread(checkpoint: Checkpoint, prefix: str = "") -> None:
    """Raises `UserError` naming the formats that the ranks do not read, of the keys that begin with `prefix`."""
    unread = sorted(set(_formats(checkpoint, prefix)) - set(READ))
    if unread:
        raise UserError(
            f"{checkpoint.source} is quantized as {', '.join(unread)}, which the ranks do not read.",
            "Use the model's bf16 or fp8 file. To save memory with it, choose fp8 as weight_dtype of Parallel Loader, "
            "or weights sharded or offloaded in Parallel Layout.",
        )


def _formats(checkpoint: Checkpoint, prefix: str) -> Iterator[str]:
    if METADATA in checkpoint.metadata:
        layers = _named_formats(checkpoint, checkpoint.metadata[METADATA].encode(), METADATA)
        yield from (name for layer, name in layers if layer.startswith(prefix))
    for key in checkpoint.tensors:
        if not key.startswith(prefix):
            continue
        if key.rsplit(".", 1)[-1] == FORMAT:
            text = bytes(checkpoint.tensor(key).flatten().tolist())
            yield from (name for _, name in _named_formats(checkpoint, text, key))
        else:
            yield from (name for mark, name in OTHERS if mark.search(key))


def _named_formats(checkpoint: Checkpoint, text: bytes, place: str) -> Iterator[tuple[str, str]]:
    """The formats that a JSON text names, each after its layer: of one layer, or of all `layers`."""
    try:
        declared = json.loads(text)
        for name, layer in declared["layers"].items() if place == METADATA else ((place, declared),):
            yield name, str(layer["format"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{checkpoint.source}: {place} does not tell the format of quantized layers.") from error
