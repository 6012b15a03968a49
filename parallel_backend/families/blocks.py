"""A block of a model, compiled or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from .state import TokenState

Block = Callable[[TokenState], TokenState]


class PartlyCompiled(ABC):
    """A block that does more than compute: it keeps things from one call to the next, or names them."""

    @abstractmethod
    def __call__(self, state: TokenState) -> TokenState:
        """The state behind the block."""

    @abstractmethod
    def compiled(self) -> Block:
        """The same block, what it computes made by `torch.compile`."""


GRAPHS = 128
"""How many graphs the blocks of one family may have, in all sizes of pictures, with and without LoRAs."""


def compiled(blocks: Sequence[Block]) -> list[Block]:
    """The blocks as `torch.compile` makes them: one of each kind, when it is first used with tensors of such sizes.

    Where ranks talk within a block, it is in pieces. All blocks of a family are one function to the compiler, however
    many kinds there are, and it would give up after 8 graphs.
    """
    torch._dynamo.config.cache_size_limit = GRAPHS  # newer releases of torch know it by this name, too
    return [block.compiled() if isinstance(block, PartlyCompiled) else torch.compile(block) for block in blocks]
