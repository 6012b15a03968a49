"""Whether a layout fits what it is to be used for, and which would: the one judge, asked by nodes and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from math import log2
from typing import Any

from ..errors import UserError
from .layout import AXES, Layout
from .rules import RULES, Misfit, RunFacts, patches_misfit, stages_misfit

SHOWN = 3
"""How many layouts an error names that would fit."""


def check_layout(layout: Layout, work: RunFacts) -> None:
    """Raise `UserError` when `layout` does not fit: why, what to do, and the nearest layouts that do."""
    misfit = misfit_of(layout, work)
    if misfit is None:
        return
    reason, remedy = misfit
    near = [_named(other) for other in nearest_layouts(layout, work)]
    raise UserError(reason, f"{remedy} Nearest that fits: {'; '.join(near)}." if near else remedy)


def _named(layout: Layout) -> str:
    return f"{layout}, num_patches {layout.num_patches}" if layout.num_patches else str(layout)


def misfit_of(layout: Layout, work: RunFacts) -> Misfit | None:
    """The first reason why `layout` does not fit."""
    return next((misfit for rule in RULES if (misfit := rule(layout, work))), None)


def nearest_layouts(layout: Layout, work: RunFacts) -> list[Layout]:
    """Layouts that fit, of as many ranks as there are, whose degrees differ least from those of `layout`.

    Where its degrees are right and only a setting of PipeFusion is wrong, that one is mended. An approximate method is
    named only to those who asked for one.
    """
    mended = _mended(layout, work)
    if mended != layout and not misfit_of(mended, work):
        return [mended]
    found = [other for other in layouts_that_fit(layout, work) if other.is_exact >= layout.is_exact]
    return sorted(found, key=lambda other: (_distance(layout, other), -other.ulysses_degree, -other.ring_degree))[
        :SHOWN
    ]


def layouts_that_fit(layout: Layout, work: RunFacts) -> list[Layout]:
    """Every layout of as many ranks as there are that fits, with the settings of `layout`."""
    ranks = layout.ranks if work.ranks is None else work.ranks
    found = (layout.with_degrees(degrees) for degrees in _factors(ranks, len(AXES)))
    return [other for other in (_mended(each, work) for each in found) if not misfit_of(other, work)]


def _mended(layout: Layout, work: RunFacts) -> Layout:
    """The same degrees with settings of PipeFusion that fit the run; without any where there is none."""
    if layout.pipefusion_degree == 1:
        return layout.model_copy(update={"num_patches": 0, "stage_blocks": ()})
    found: dict[str, Any] = {}
    if patches_misfit(layout, work):
        found["num_patches"] = work.token_rows
    if stages_misfit(layout, work):
        found["stage_blocks"] = "even"
    return layout.model_copy(update=found)


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `number` as a product of `count` factors."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in _factors(number // first, count - 1))


def _distance(layout: Layout, other: Layout) -> float:
    return sum(abs(log2(layout.degree(axis) / other.degree(axis))) for axis in AXES)
