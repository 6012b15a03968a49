"""Tokens and modulation between blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .condition import ShownPrompt


@dataclass
class TokenState:
    """The tokens that one rank holds between two blocks. A block returns a new state.

    `image` `[B, Si, h]`, `text` `[B, St, h]`, `modulation` `[B, h]`; for the families that turn their queries and keys,
    `rotary` `[St + Si, D / 2, 2]` (tokens.rotary); `skips`: image tokens that a later block takes in, by the number
    of the block that gave them; `prompts`: the pictures that its blocks are shown.
    """

    image: Tensor
    text: Tensor
    modulation: Tensor
    rotary: Tensor | None = None
    skips: Mapping[int, Tensor] = field(default_factory=dict)
    prompts: tuple[ShownPrompt, ...] = ()
