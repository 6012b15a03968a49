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
    place = matrix.cell(matrix.LATE, Layout(pipefusion_degree=2), "sd3")
    worse = matrix.written(page, {place: 0.123})
    assert ": 1.2e-01 |" in matrix.summarized(readme, worse)


def test_written_tables_are_read_back(page):
    place = matrix.cell(matrix.EXACT, Layout(), "flux")
    again = matrix.written(page, {place: 3.21e-7})
    assert matrix.shown(again) == {**matrix.shown(page), place: "3.2e-07"}
    assert matrix.written(again, {}) == again


def test_a_cell_that_was_never_measured_is_not_written(page):
    with pytest.raises(ValueError, match="never measured"):
        matrix.written(page.replace("| 1 | one rank |", "| 1 | no layout |"), {})
