"""The support matrix claims what the tables of tests cover, no cell more and none less, and the README sums it up."""

import pytest
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.tests.ranks import matrix


@pytest.fixture(scope="module")
def page():
    return matrix.PAGE.read_text()


def test_the_page_shows_the_cells_that_are_tested(page):
    shown, claimed = set(matrix.shown(page)), set(matrix.claimed())
    assert shown == claimed, "`make matrix` writes the tables anew"


def test_the_readme_sums_the_page_up(page):
    readme = matrix.README.read_text()
    assert matrix.summarized(readme, page) == readme, "`make matrix` writes the summary anew"


@pytest.mark.parametrize(
    ("table", "layout", "columns"),
    [
        (matrix.LATE, Layout(pipefusion_degree=2), ["PipeFusion"]),
        (matrix.EXACT, Layout(ulysses_degree=2, cfg_degree=2), ["CFG", "Ulysses"]),
        (matrix.EXACT, Layout(ring_degree=3, weights="sharded"), ["Ring", "Sharded or offloaded weights"]),
        (matrix.BF16, Layout(tensor_degree=2), ["In bf16"]),
    ],
    ids=str,
)
def test_a_layouts_error_counts_for_its_family_and_the_methods_that_it_uses(page, table, layout, columns):
    readme = matrix.README.read_text()
    worse = matrix.written(page, {matrix.cell(table, layout, "sd3"): 0.123})
    (before,) = rows(readme) - rows(matrix.summarized(readme, worse))
    (after,) = rows(matrix.summarized(readme, worse)) - rows(readme)
    head = next(row for row in rows(readme) if "Family" in row)
    changed = {name: new for name, old, new in zip(head, before, after, strict=True) if old != new}
    assert before[0] == "Stable Diffusion 3"
    assert changed == dict.fromkeys(columns, "1.2e-01")


def rows(readme: str) -> set[tuple[str, ...]]:
    """The cells of each row of the summary."""
    _, _, rest = readme.partition(f"<!-- matrix: {matrix.SUMMARY} -->\n")
    table, _, _ = rest.partition("<!-- end of matrix -->")
    return {tuple(cell.strip() for cell in row.strip("|").split("|")) for row in table.splitlines()}


def test_written_tables_are_read_back(page):
    place = matrix.cell(matrix.EXACT, Layout(), "flux")
    again = matrix.written(page, {place: 3.21e-7})
    assert matrix.shown(again) == {**matrix.shown(page), place: "3.2e-07"}
    assert matrix.written(again, {}) == again


def test_a_cell_that_was_never_measured_is_not_written(page):
    with pytest.raises(ValueError, match="never measured"):
        matrix.written(page.replace("| 1 | one rank |", "| 1 | no layout |"), {})
