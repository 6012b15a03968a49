"""Kinds of LoRA files that the ranks do not apply, and what is said of them: by Parallel LoRA and for ComfyUI's own."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from ..errors import UserError


class UnreadKind(NamedTuple):
    """`signs`: endings that together only such files' keys have, in one of several ways. `patches`: what ComfyUI calls
    such a change of a weight."""

    title: str
    signs: tuple[tuple[str, ...], ...]
    patches: tuple[str, ...]
    remedy: str


CONTROL = UnreadKind(
    "a control LoRA: it widens the model's input and replaces norms",
    ((".set_weight",), (".reshape_weight",), ("img_in.lora_A.weight", ".norm.key_norm.scale")),
    ("set", "reshape"),
    "Use the whole control model, such as Flux.1 Depth dev, in Parallel Loader, or a ControlNet.",
)
_REMEDY = "Use a LoRA, LoHa, LoKr or DoRA of it."
UNREAD_KINDS = (
    CONTROL,
    UnreadKind("an OFT or BOFT: it turns the weights", ((".oft_blocks",),), ("oft", "boft"), _REMEDY),
    UnreadKind("a GLoRA: it scales the weights", ((".a1.weight", ".b2.weight"),), ("glora",), _REMEDY),
)


def unread_kind(keys: Collection[str]) -> UnreadKind | None:
    """Which of them a file with these keys is."""

    def has(ending: str) -> bool:
        return any(key.endswith(ending) for key in keys)

    return next((kind for kind in UNREAD_KINDS if any(all(map(has, signs)) for signs in kind.signs)), None)


def unread_patch(name: str) -> UnreadKind | None:
    """Which of them ComfyUI read, if it calls a change so."""
    return next((kind for kind in UNREAD_KINDS if name in kind.patches), None)


def refusal(what: str, kind: UnreadKind) -> UserError:
    """`what`: the file, or the graph's LoRA."""
    return UserError(f"{what} is {kind.title}, which the ranks do not do.", kind.remedy)
