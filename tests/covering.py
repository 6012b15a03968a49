"""The part of a table of cases that `make test` runs: whatever meets in a case of the table meets in one of the part.

`make matrix` runs the whole of every table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations, product
from typing import TypeVar

from paralleldit.parallel_backend.layout.layout import AXES, Layout

WHOLE = "PARALLELDIT_WHOLE_MATRIX" in os.environ
OPTIONS = ("weights", "refresh", "stage_blocks", "compile")
"""Settings of a layout beside its degrees that decide what ranks do."""
Case = TypeVar("Case")
Meetings = set[frozenset[Hashable]]


def covering(
    cases: Iterable[Case],
    meetings: Callable[[Case], Meetings],
    cost: Callable[[Case], float] = lambda case: 1,
    *,
    whole: bool = WHOLE,
) -> list[Case]:
    """The cases, in their order, without those whose meetings are all in others; all of them with `whole`.

    They are chosen one after the other: each time the one with the most meetings that are still missing for its cost,
    the first of equals. In the end, the dearest that have become needless go.
    """
    cases = list(cases)
    if whole:
        return cases
    met, costs = [meetings(case) for case in cases], [cost(case) for case in cases]
    missing = [set(each) for each in met]
    chosen: list[int] = []
    while any(missing):
        best = max(range(len(cases)), key=lambda index: len(missing[index]) / costs[index])
        chosen.append(best)
        for each in missing:
            each -= met[best]
    for index in sorted(chosen, key=lambda index: -costs[index]):
        if met[index] <= set().union(*(met[other] for other in chosen if other != index)):
            chosen.remove(index)
    return [cases[index] for index in sorted(chosen)]


def pairs(settings: Sequence[Hashable]) -> Meetings:
    """Every two of the settings, and every one of them."""
    return {frozenset(each) for count in (1, 2) for each in combinations(settings, count)}


def pairs_of(layout: Layout, *others: Hashable) -> Meetings:
    """What meets in a case of this layout and of `others`: a family, a shape, a sampler.

    Each two of the axes in use, the options and the others; and every degree with each option and each of the others.
    """
    used = [axis for axis in AXES if layout.degree(axis) > 1]
    degrees = [(axis, layout.degree(axis)) for axis in used]
    beside = [*((name, getattr(layout, name)) for name in OPTIONS), *others]
    return pairs([*(used or ["one rank"]), *beside]) | {frozenset(each) for each in product(degrees, beside)}
