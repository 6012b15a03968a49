"""In which order the stages of PipeFusion work, and how far ahead of it messages may be on their way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...sampling.solver import Denoise


@dataclass(frozen=True)
class Unit:
    """The unit of work of a stage: neighbouring `patches`, for the sampler's call of that number."""

    call: int
    patches: tuple[int, ...]


def units_of(calls: Sequence[Denoise], patches: int, warmup_steps: int) -> list[Unit]:
    """The order of work, the same in every stage: the whole picture while warming up, then patch by patch."""
    units = []
    for number, call in enumerate(calls):
        whole = call.step < warmup_steps
        parts = [tuple(range(patches))] if whole else [(patch,) for patch in range(patches)]
        units += [Unit(number, part) for part in parts]
    return units


def posted_ahead(stages: int, patches: int, distance: int) -> int:
    """How many units ahead of the one that it computes a stage posts receives from the stage `distance` before it.

    So many that no stage ever waits for another's progress in a circle, even where each waits for all that it has begun
    to send and receive before it computes on. (A GPU's host does: to load a kernel for the first time, to give back
    memory.) A patch needs the output of the last stage for the unit `patches` before. So along any circle of stages
    fewer units than that may be posted ahead altogether. And a message that passes over stages can only be as far ahead
    as its sender is, whose sends to the stages between have to be received first.
    """
    hop = (patches - 1) // stages
    on_its_way = distance * (1 + hop) - 1
    left_by_hops = patches - 1 - (stages - distance) * hop
    return min(on_its_way, left_by_hops)
