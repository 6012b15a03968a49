"""The interface of attention at a model's sites, the same whichever ranks it spans.

A site is a place in a block where the tokens of one rank need those of another. A strategy finds what it keeps for a
site (keys and values, sums) by the site's id, whatever other sites have been called before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..distributed.axis import Exchange

SiteId = tuple[int | str, ...]
"""The number of a block, then the name of the site within the block."""

Streams = tuple[str, ...]
"""The names of the streams that a site's tokens belong to, in the order in which they are concatenated."""

KeysValues = tuple[Tensor, Tensor]
"""Keys and values, `[B, S, H, D]` each."""

Sum = Callable[[slice], Tensor]
"""Maps a slice of this rank's tokens of a stream to their contribution to a sum over all tokens."""


class Sent:
    """A projection of this rank's tokens, on its way to the ranks that attend with it."""

    def __init__(
        self,
        x: Tensor,
        streams: Streams,
        exchange: Exchange | None = None,
        length: int = 0,
        own_heads: int = 0,
        serves: Sequence[int] | None = None,
    ) -> None:
        """`exchange`: brings `own_heads` heads of `length` tokens, of all ranks of the Ulysses axis.

        `serves`: for each query head of this rank the one of these heads that it attends to; None: each to its own.
        """
        self.streams = streams
        self.serves = serves
        self.batch, _, self.heads, self.dim = x.shape
        self._x, self._exchange, self._length, self._own_heads = x, exchange, length, own_heads

    def wait(self) -> Tensor:
        """`[B, h, S_chunk, D]`: this rank's heads, for all tokens of its Ulysses axis."""
        if self._exchange is None:
            return self._x.transpose(1, 2)
        received = self._exchange.wait().view(self._length, self._own_heads, self.batch, self.dim)
        return received.permute(2, 1, 0, 3)


@dataclass(frozen=True)
class KeySet:
    """Keys and values that queries attend to. A site's softmax is over all of its sets together.

    `log_weight`: what is added to the scores of the set. `places`: where the tokens of queries and keys are frames of
    so many places, a query attends to the keys of its own place alone.
    """

    key: Sent
    value: Sent
    log_weight: float = 0.0
    places: int | None = None


class Attention(Protocol):
    """What every site of a model calls: `send` with each projection as soon as it is there, then itself.

    The site computes what it can between the two: the exchange goes on behind it. Where attention `keeps` keys and
    values for the next evaluation, they are those of the site of that id.
    """

    keeps: bool

    def set_lengths(self, lengths: Mapping[str, Sequence[int]]) -> None:
        """Say how many tokens of each stream every sequence-parallel rank holds: ring-major, Ulysses-minor."""
        ...

    def send(self, x: Tensor, streams: Streams, serves: Sequence[int] | None = None) -> Sent:
        """Start to send this rank's tokens of `streams`, `[B, S, H, D]`.

        `serves`: where keys and values have fewer heads than queries (grouped-query attention, arXiv 2305.13245), for
        each of this rank's query heads, in rising order, the one of these heads that it attends to.
        """
        ...

    def __call__(self, site: SiteId, q: Sent, *sets: KeySet, extra_kv: KeysValues | None = None) -> Tensor:
        """Attention of this rank's queries over all ranks' keys and values of `sets`: `[B, S, H, D]`.

        `extra_kv`: keys and values that every rank has, a head for each query head, to be attended to once as well.
        """
        ...

    def local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within this rank alone, `[B, S, H, D]`: where what a query attends to is on its own rank."""
        ...

    def total(self, site: SiteId, stream: str, of: Sum) -> Tensor:
        """The sum over all tokens of `stream`, equal on every rank. `of` is asked for parts of this rank's tokens."""
        ...

    def halo(self, site: SiteId, stream: str, x: Tensor, row: int) -> list[Tensor]:
        """This rank's tokens `x` `[B, S, c]` of a stream of one grid, given out in whole rows of `row` tokens.

        Each run of them that is one in the grid comes with the rows before and after it, `[B, S' + 2 * row, c]`: zeros
        at the ends of the grid. There is one run for each patch at hand.
        """
        ...
