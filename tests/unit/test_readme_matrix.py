"""The README's support matrix claims what the tables of tests cover: no cell more, and none less."""

import pytest
from paralleldit.parallel_backend.layout import Layout
from paralleldit.tests.ranks import matrix


@pytest.fixture(scope="module")
def readme():
    return matrix.README.read_text()


def test_readme_shows_the_cells_that_are_tested(readme):
    shown, claimed = set(matrix.shown(readme)), set(matrix.claimed())
    assert shown == claimed, "`make matrix` writes the tables anew"


def test_written_tables_are_read_back(readme):
    place = matrix.cell(matrix.EXACT, Layout(), "flux")
    again = matrix.written(readme, {place: 3.21e-7})
    assert matrix.shown(again) == {**matrix.shown(readme), place: "3.2e-07"}
    assert matrix.written(again, {}) == again


def test_a_cell_that_was_never_measured_is_not_written(readme):
    with pytest.raises(ValueError, match="never measured"):
        matrix.written(readme.replace("| 1 | one rank |", "| 1 | no layout |"), {})
