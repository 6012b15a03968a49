"""What the attention sites of a model see of attention, whichever ranks it spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..distributed.axis import Exchange
from ..tokens.plan import Tokens

KeysValues = tuple[Tensor, Tensor]
"""Keys and values, `[B, S, H, D]` each."""


class Sent:
    """A projection of this rank's tokens, on its way to the ranks that attend with it."""

    def __init__(
        self, x: Tensor, tokens: Tokens, exchange: Exchange | None = None, length: int = 0, own_heads: int = 0
    ) -> None:
        """`exchange`: brings `own_heads` heads of `length` tokens, of all ranks of the Ulysses axis."""
        self.tokens: Tokens = tokens
        self.batch, _, self.heads, self.dim = x.shape
        self._x, self._exchange, self._length, self._own_heads = x, exchange, length, own_heads

    def wait(self) -> Tensor:
        """`[B, h, S_chunk, D]`: this rank's heads, for all tokens of its Ulysses axis."""
        if self._exchange is None:
            return self._x.transpose(1, 2)
        received = self._exchange.wait().view(self._length, self._own_heads, self.batch, self.dim)
        return received.permute(2, 1, 0, 3)


class Attention(Protocol):
    """What every attention site of a model calls: `send` with each projection as soon as it is there, then itself.

    The site computes what it can between the two: the exchange goes on behind it. Where attention `keeps` keys and
    values for the next evaluation, every site is called in every evaluation, in the same order.
    """

    keeps: bool

    def set_lengths(self, text: Sequence[int], image: Sequence[int]) -> None:
        """Say how many tokens each sequence-parallel rank holds, in the order ring-major, Ulysses-minor."""
        ...

    def send(self, x: Tensor, tokens: Tokens = "all") -> Sent:
        """Start to send this rank's `tokens`, `[B, S, H, D]`: of "all", the text comes first."""
        ...

    def __call__(self, q: Sent, k: Sent, v: Sent, beside: KeysValues | None = None) -> Tensor:
        """`beside`: keys and values of all heads that every rank has, to be attended to once as well."""
        ...
