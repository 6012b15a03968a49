"""The weight patches that ComfyUI's LoRA nodes leave on a MODEL, as changes that the ranks add to their layers.

A LoRA's own small tensors are sent once; later requests name a patch by the digest of its tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...parallel_backend.errors import UserError
from ...parallel_backend.files.lora_kinds import UNREAD_KINDS, refusal, unread_patch
from ...parallel_backend.protocol.messages import WeightChange
from ..handles import SentChange

PREFIX = "diffusion_model."
ROLES = {
    "lora": ("up", "down", "alpha", "mid", "dora_scale", None),
    "loha": ("w1_a", "w1_b", "alpha", "w2_a", "w2_b", "t1", "t2", "dora_scale"),
    "lokr": ("kron_1", "kron_2", "alpha", "kron_1_a", "kron_1_b", "kron_2_a", "kron_2_b", "kron_t2", "dora_scale"),
}
"""The tensors of each of ComfyUI's kinds of adapter, in its order; None for one that is not supported."""
SWAP = "swap_scale_shift"
"""ComfyUI's function for a patch whose halves are the other way around in the diffusers layout."""

_digests = WeakTensorKeyDictionary()
"""Digests of hashed tensors, kept as long as the tensors: those of a loaded LoRA outlive many runs."""


def changes_of(patches: Mapping[str, Sequence[Any]]) -> list[SentChange]:
    """The patches of a ModelPatcher. Raises `UserError` naming those that cannot travel."""
    changes = [_change(key, patch) for key, of_key in patches.items() for patch in of_key]
    kinds = {unread_patch(each.partition(" ")[0]) for each in changes if isinstance(each, str)} - {None}
    if kinds:
        raise refusal("A LoRA of the graph", next(kind for kind in UNREAD_KINDS if kind in kinds))
    strange = sorted({each for each in changes if isinstance(each, str)})
    if strange:
        raise UserError(
            f"The model carries weight patches that cannot be sent to the ranks: {'; '.join(strange[:4])}.",
            "Remove the node that sets them, or use another LoRA: LoRA, LoHa, LoKr and DoRA are read.",
        )
    return [each for each in changes if isinstance(each, SentChange)]


def _change(key: str, patch: Any) -> SentChange | str:
    """Converts one patch to a change; returns its kind, in words, if it cannot be sent."""
    strength, value, strength_model, offset, function = patch
    name = _kind_of(value)
    if strength_model != 1.0 or not key.startswith(PREFIX):
        return f"a merged model ({key})"
    if function is not None and function.__name__ != SWAP:
        return f"a function of weights ({key})"
    if offset is not None and offset[0] != 0:
        return f"a change of columns ({key})"
    if name == "lora" and getattr(value, "weights", (None,))[-1] is not None:
        return f"reshape ({key})"
    parts = _parts(name, value)
    if parts is None:
        return f"{name} ({key})"
    change = WeightChange(
        key=key.removeprefix(PREFIX),
        digest=_digest(parts),
        strength=float(strength),
        rows=None if offset is None else (offset[1], offset[2]),
        swap_halves=function is not None,
    )
    return SentChange(change, parts)


def _kind_of(value: Any) -> str:
    """As ComfyUI names it."""
    return getattr(value, "name", None) or (value[0] if isinstance(value, tuple) and len(value) == 2 else "diff")


def _parts(name: str, value: Any) -> dict[str, Tensor] | None:
    """The tensors of a patch by role; None for a kind that the ranks do not know."""
    if name == "diff":
        return {"diff": (value[1] if len(value) == 2 else value)[0]}
    roles = ROLES.get(name)
    if roles is None:
        return None
    given = [(role, each) for role, each in zip(roles, value.weights, strict=True) if each is not None]
    if any(role is None for role, _ in given):
        return None
    return {role: each if isinstance(each, Tensor) else torch.tensor(float(each)) for role, each in given if role}


def _digest(parts: Mapping[str, Tensor]) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for role, tensor in sorted(parts.items()):
        if tensor not in _digests:
            _digests[tensor] = hashlib.blake2b(b"".join(_bytes_of(tensor)), digest_size=16).digest()
        whole.update(role.encode() + _digests[tensor])
    return whole.hexdigest()


def _bytes_of(tensor: Tensor) -> Iterator[bytes]:
    yield f"{tensor.dtype} {list(tensor.shape)}".encode()
    yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
