"""What the shapes of a file's tensors say of any model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from ..spec import Shapes


def landmark_shapes(
    model: str, shapes: Shapes, landmarks: Mapping[str, str], dims: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """The shapes of the `landmarks`, by their meaning.

    Raises `UserError` where one of them has another number of dims than `dims` says, or than 2 where it says nothing.
    """
    found = {fact: shapes[key] for fact, key in landmarks.items()}
    if any(len(shape) != dims.get(fact, 2) for fact, shape in found.items()):
        raise UserError(f"The tensors of this {model} model have unexpected shapes: {found}.")
    return found


def count_heads(hidden: int, head_dim: Any) -> int:
    """The heads of width `head_dim` that make up the hidden size. Raises `UserError` where none or a part of one do."""
    if type(head_dim) is not int or head_dim < 1 or not hidden or hidden % head_dim:
        raise UserError(f"The hidden size {hidden} is not a multiple of the head dim {head_dim!r}.")
    return hidden // head_dim


def count_channels(output: int, patch: Any) -> int:
    """The channels of a model that predicts `output` values for `patch` x `patch` cells. Raises `UserError`."""
    if type(patch) is not int or patch < 1 or output % patch**2:
        raise UserError(f"patch_size {patch!r} does not divide the {output} output channels.")
    return output // patch**2


def rotary_axes(head_dim: int, declared: Any = None, side: float = 7 / 16) -> tuple[int, int, int]:
    """How many channels of a head turn by index, by row and by column: as declared, or else by row and column the
    largest even number up to `side` of them each, and by index the rest.

    Raises `UserError` for others than three even numbers that make up the head.
    """
    each = int(head_dim * side) // 2 * 2
    axes = tuple(declared) if isinstance(declared, list | tuple) else (head_dim - 2 * each, each, each)
    if len(axes) != 3 or any(type(axis) is not int or axis < 2 or axis % 2 for axis in axes) or sum(axes) != head_dim:
        raise UserError(f"The rotary axes {axes} are not three even numbers that add up to the head dim {head_dim}.")
    return axes


def neighbour(kinds: Mapping[str, str], shapes: Shapes) -> str | None:
    """The kind of the first of these keys that the file has."""
    return next((kind for key, kind in kinds.items() if key in shapes), None)
