"""What decides, block by block, whether a block is computed."""

from __future__ import annotations

from typing import Protocol

from ..families.state import Evaluation, State


class BlockPolicy(Protocol):
    """Is consulted around every block of an evaluation. Ranks that compute one prediction must get the same inputs.

    A block that is not computed moves nothing: what sites keep is found by their ids, and sharded weights are gathered
    for blocks that are computed alone.
    """

    def before(self, block: int, state: State) -> State | None:
        """The state behind the block, where it is known already; None: compute the block."""
        ...

    def after(self, block: int, before: State, after: State) -> None:
        """The block was computed, from the state `before` to the state `after` it."""
        ...


class StepCache(Protocol):
    """Gives each evaluation of a run its policy."""

    def at(self, sigma: float) -> None:
        """The next evaluations are at the noise level `sigma`."""
        ...

    def policy(self, evaluation: Evaluation) -> BlockPolicy: ...


class Counts(Protocol):
    """Says how many evaluations were computed whole, of how many."""

    whole: int
    all: int


class ComputeAll:
    """Without a cache: every block is computed."""

    def at(self, sigma: float) -> None:
        """It does not matter."""

    def policy(self, evaluation: Evaluation) -> BlockPolicy:
        return self

    def before(self, block: int, state: State) -> State | None:
        return None

    def after(self, block: int, before: State, after: State) -> None:
        """Nothing is kept."""


COMPUTE_ALL = ComputeAll()


class CountedComputeAll(ComputeAll):
    """Computes all, and counts the evaluations: those of a run in which its step cache is not at work."""

    def __init__(self) -> None:
        self.whole = self.all = 0

    def policy(self, evaluation: Evaluation) -> BlockPolicy:
        self.whole += evaluation.condition.joins
        self.all += evaluation.condition.joins
        return self
