"""The support matrix: which cells the tables of tests claim, which docs/MATRIX.md shows, and how it is written.

A cell is a layout with a family. Its figure is the largest relative error that the tests of it have noted. The README
has a summary: the largest error of each family with each method, and how many layouts the family was tested in.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from paralleldit.parallel_backend.families.registry import FAMILIES
from paralleldit.parallel_backend.layout.layout import Layout

PACK = Path(__file__).resolve().parents[2]
README, PAGE = PACK / "README.md", PACK / "docs" / "MATRIX.md"
MODULES = (
    "test_exact_layouts",
    "test_pipefusion",
    "test_pipefusion_families",
    "test_distrifusion",
    "test_row_parallel",
)
"""Those whose function `cells` says what their tests note."""

EXACT, LATE, BF16 = "exact", "late", "bf16"
TABLES = (EXACT, LATE, BF16)
SUMMARY = "summary"
METHODS = {
    "Ulysses": "ulysses",
    "Ring": "ring",
    "CFG": "cfg",
    "Data": "data",
    "Tensor": "tensor",
    "Sharded or offloaded weights": ", weights ",
    "PipeFusion": "pipefusion",
    "DistriFusion": "distrifusion",
}
"""The columns of the summary: a layout uses a method when its name in the tables has this part."""
UNTESTED = "–"
COLUMNS = {spec.name: spec.title for spec in FAMILIES.values()}

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


def shown(page: str) -> dict[Cell, str]:
    """The figures in the page's tables."""
    figures = {}
    for table in TABLES:
        head, _, rows = _section(page, table)[1].partition("|\n|---")
        of_title = {title: family for family, title in COLUMNS.items()}
        families = [of_title.get(title.strip()) for title in head.split("|")[3:]]
        for line in rows.splitlines()[1:]:
            ranks, layout, *values = (value.strip() for value in line.strip().strip("|").split("|"))
            for family, value in zip(families, values, strict=True):
                if value and family:
                    figures[table, f"{ranks} | {layout}", family] = value
    return figures


def written(page: str, noted: dict[Cell, float]) -> str:
    """The page with the cells that the tests claim: their new figures, or the ones that it has.

    Raises ValueError for a cell that has neither.
    """
    old = shown(page)
    figures = {place: f"{noted[place]:.1e}" if place in noted else old.get(place, "") for place in claimed()}
    missing = [" ".join(place) for place, figure in figures.items() if not figure]
    if missing:
        raise ValueError(f"{len(missing)} cells were never measured; run their tests too: {'; '.join(missing[:5])} …")
    for table in TABLES:
        page = _replaced(page, table, rendered(table, figures))
    return page


def summarized(readme: str, page: str) -> str:
    """The README with the summary of the page's tables: for each family and method the largest error in fp32 of all
    layouts that use the method, the largest error in bf16, and the number of layouts in fp32."""
    head = ["Family", *METHODS, "In bf16", "Layouts"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    figures = shown(page)
    for family, title in COLUMNS.items():
        errors = [(table, row, float(error)) for (table, row, of), error in figures.items() if of == family]
        fp32 = [(row, error) for table, row, error in errors if table != BF16]
        cells = [_largest(error for row, error in fp32 if part in row) for part in METHODS.values()]
        cells.append(_largest(error for table, _, error in errors if table == BF16))
        lines.append(f"| {' | '.join([title, *cells, str(len(fp32))])} |")
    return _replaced(readme, SUMMARY, lines)


def _largest(errors: Iterable[float]) -> str:
    return f"{found:.1e}" if (found := max(errors, default=None)) is not None else UNTESTED


def _replaced(text: str, table: str, lines: list[str]) -> str:
    before, _, after = _section(text, table)
    return "\n".join((before, *lines, after))


def _section(text: str, table: str) -> tuple[str, str, str]:
    """What stands up to, between and from the markers of `table`."""
    begin, end = f"<!-- matrix: {table} -->", "<!-- end of matrix -->"
    before, found, rest = text.partition(begin)
    if not found:
        raise ValueError(f"there is no {begin} to write the table behind")
    inside, _, after = rest.partition(end)
    return before + begin, inside, end + after
