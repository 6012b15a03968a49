"""The README's support matrix: which cells the tables of tests claim, which the README shows, and how it is written.

A cell is a layout with a family. Its figure is the largest relative error that the tests of it have noted.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

from paralleldit.parallel_backend.layout import Layout

README = Path(__file__).resolve().parents[2] / "README.md"
MODULES = ("test_exact_layouts", "test_pipefusion", "test_pipefusion_families", "test_distrifusion")
"""Those whose function `cells` says what their tests note."""

EXACT, LATE, BF16 = "exact", "late", "bf16"
TABLES = (EXACT, LATE, BF16)
COLUMNS = {
    "flux": "Flux.1",
    "sd3": "Stable Diffusion 3",
    "pixart-alpha": "PixArt-alpha",
    "pixart-sigma": "PixArt-Sigma",
    "hunyuandit": "HunyuanDiT",
}

Cell = tuple[str, str, str]
"""Table, row and family."""


def cell(table: str, layout: Layout, family: str) -> Cell:
    in_turn = ", in turn" if layout.refresh == "in_turn" else ""
    nothing_old = "" if layout.is_exact or table != EXACT else ", nothing old"
    return table, f"{layout.ranks} | {layout}{in_turn}{nothing_old}", family


def claimed() -> Iterator[Cell]:
    for name in MODULES:
        yield from importlib.import_module(f"paralleldit.tests.ranks.{name}").cells()


class Figures:
    """What the tests of this session have noted."""

    def __init__(self) -> None:
        self.noted: dict[Cell, float] = {}

    def note(self, table: str, layout: Layout, family: str, error: float) -> None:
        place = cell(table, layout, family)
        self.noted[place] = max(error, self.noted.get(place, 0.0))

    def lines(self) -> Iterator[str]:
        figures = {place: f"{error:.1e}" for place, error in self.noted.items()}
        for table in TABLES:
            if any(place[0] == table for place in figures):
                yield from (f"{table}:", *rendered(table, figures))


def rendered(table: str, figures: dict[Cell, str]) -> list[str]:
    """The Markdown table of what there is for `table`, its rows in the order of `figures`."""
    rows = dict.fromkeys(row for name, row, _ in figures if name == table)
    head = ["| Ranks | Layout | " + " | ".join(COLUMNS.values()) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    cells = {row: [figures.get((table, row, family), "") for family in COLUMNS] for row in rows}
    return head + [re.sub(" {2,}", " ", f"| {row} | {' | '.join(values)} |") for row, values in cells.items()]


def shown(readme: str) -> dict[Cell, str]:
    """The figures in the README's tables."""
    figures = {}
    for table in TABLES:
        _, _, rows = _section(readme, table)[1].partition("|\n|---")
        for line in rows.splitlines()[1:]:
            ranks, layout, *values = (value.strip() for value in line.strip().strip("|").split("|"))
            for family, value in zip(COLUMNS, values, strict=True):
                if value:
                    figures[table, f"{ranks} | {layout}", family] = value
    return figures


def written(readme: str, noted: dict[Cell, float]) -> str:
    """The README with the cells that the tests claim: their new figures, or the ones that it has.

    Raises ValueError for a cell that has neither.
    """
    old = shown(readme)
    figures = {place: f"{noted[place]:.1e}" if place in noted else old.get(place, "") for place in claimed()}
    missing = [" ".join(place) for place, figure in figures.items() if not figure]
    if missing:
        raise ValueError(f"{len(missing)} cells were never measured; run their tests too: {'; '.join(missing[:5])} …")
    for table in TABLES:
        before, _, after = _section(readme, table)
        readme = "\n".join((before, *rendered(table, figures), after))
    return readme


def _section(readme: str, table: str) -> tuple[str, str, str]:
    """What stands up to, between and from the markers of `table`."""
    begin, end = f"<!-- matrix: {table} -->", "<!-- end of matrix -->"
    before, found, rest = readme.partition(begin)
    if not found:
        raise ValueError(f"{README} has no {begin}")
    inside, _, after = rest.partition(end)
    return before + begin, inside, end + after
