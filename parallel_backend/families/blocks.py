"""The blocks of a model, compiled or not, and the one loop that goes through them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .state import State

if TYPE_CHECKING:
    from ..caches.policy import BlockPolicy

Block = Callable[[State], State]


class PartlyCompiled(ABC):
    """A block that does more than compute: it keeps things from one call to the next, or names them."""

    @abstractmethod
    def __call__(self, state: State) -> State:
        """The state behind the block."""

    @abstractmethod
    def compiled(self) -> Block:
        """The same block, what it computes made by `torch.compile`."""


GRAPHS = 128
"""The limit of compiled graphs of one family's blocks, in all sizes of pictures, with and without LoRAs."""


def compiled(blocks: Sequence[Block]) -> list[Block]:
    """The blocks as `torch.compile` makes them: one of each kind, when it is first used with tensors of such sizes.

    Where ranks talk within a block, it is in pieces. All blocks of a family are one function to the compiler, however
    many kinds there are, and it would give up after 8 graphs.
    """
    torch._dynamo.config.cache_size_limit = GRAPHS  # newer releases of torch know it by this name, too
    return [block.compiled() if isinstance(block, PartlyCompiled) else torch.compile(block) for block in blocks]


class TakesResiduals(Protocol):
    def add_residual(self, state: State, block: int, residual: Tensor) -> State: ...


def run_blocks(
    family: TakesResiduals,
    state: State,
    blocks: Sequence[Block],
    *,
    policy: BlockPolicy,
    first: int = 0,
    residuals: Mapping[int, Tensor] | None = None,
    on_block: Callable[[int, State], None] | None = None,
) -> State:
    """The state behind `blocks`, which are number `first` and the following of the `family`.

    `policy` may know the state behind a block without computing it. `residuals`: what controls add behind blocks, by
    their numbers. `on_block` is called with the state behind every block.
    """
    for number, block in enumerate(blocks, first):
        known = policy.before(number, state)
        if known is None:
            known = block(state)
            policy.after(number, state, known)
        state = known
        if residuals and number in residuals:
            state = family.add_residual(state, number, residuals[number])
        if on_block is not None:
            on_block(number, state)
    return state
