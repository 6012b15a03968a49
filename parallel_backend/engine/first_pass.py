"""The first pass through compiled blocks: it may take minutes, so it says how far it is, and can be left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from ..families.blocks import Block
from ..families.state import State
from ..protocol import messages

if TYPE_CHECKING:
    from ..run_context import Run

LONG_S = 120.0
"""After so many seconds of compiling, the user is told what else to do."""
NOT_COMPILED = ("sigmas", "noise")
"""Tensors of a request whose shapes no block sees."""


class FirstPass:
    """Compiled blocks of which the next pass may be watched. `own`: those that this rank computes."""

    def __init__(self, blocks: Sequence[Block], own: slice) -> None:
        self.blocks: Sequence[Block] = [partial(self._call, block) for block in blocks]
        self._count = len(self.blocks[own])
        self._left = 0
        self._on_block: Callable[[int, int], None] = lambda number, count: None
        self._done: set[object] = set()
        self._key: object = None

    def watch(self, key: object, on_block: Callable[[int, int], None]) -> None:
        """Call `on_block(number, count)` before each block of the next pass, unless one of that `key` has ended."""
        self._left = 0 if key in self._done else self._count
        self._key, self._on_block = key, on_block

    def _call(self, block: Block, state: State) -> State:
        if not self._left:
            return block(state)
        self._on_block(self._count - self._left, self._count)
        result = block(state)
        self._left -= 1
        if not self._left:
            self._done.add(self._key)
        return result


def key_of(request: messages.Sample | messages.Predict, tensors: Mapping[str, Tensor]) -> object:
    """What a request's graphs depend on: equal on all ranks."""
    shapes = sorted((name, tuple(each.shape)) for name, each in tensors.items() if name not in NOT_COMPILED)
    return request.layout, bool(request.adapters), tuple(shapes)


def can_leave(request: messages.Sample | messages.Predict) -> bool:
    """Whether all ranks go through equally many blocks in their first pass, and nothing is under way between blocks:
    then they can agree before each block to leave."""
    layout = request.layout
    is_plain = layout.weights == "whole" and layout.pipefusion_degree == layout.distrifusion_degree == 1
    if layout.cfg_degree == 1 or not isinstance(request, messages.Sample):
        return is_plain and layout.cfg_degree == 1
    return is_plain and all((each.start, each.end) == (0.0, 1.0) for each in (*request.positive, *request.negative))


def reporting(run: Run, *, leaves: bool) -> Callable[[int, int], None]:
    """What a pass calls before each block: it reports, and with `leaves`, raises `Cancelled` on all ranks together."""
    began = time.monotonic()
    is_said = False

    def on_block(number: int, count: int) -> None:
        nonlocal is_said
        if leaves:
            run.check_cancelled()
        run.progress("compile", number, count)
        if time.monotonic() - began > LONG_S and not is_said:
            is_said = True
            run.log(
                "warning",
                f"Compiling has taken {time.monotonic() - began:.0f} s, for {number} of {count} blocks. To do without, "
                "cancel and set compile of Parallel Layout to off.",
            )

    return on_block
