"""The part of a table that `make test` runs has all that meets in the whole of it."""

from itertools import product

import pytest
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.tests.covering import covering, pairs, pairs_of

TABLES = {
    "all that there is of four settings": list(product("ab", "cde", "fghi", "jk")),
    "with holes": [each for each in product("ab", "cde", "fghi") if each != ("a", "c", "f")],
    "of one case": [("a", "b")],
    "of none": [],
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_all_that_meets_in_the_table_meets_in_its_part(table):
    part = covering(table, pairs, whole=False)
    assert set().union(*map(pairs, table)) == set().union(*map(pairs, part))
    assert part == [each for each in table if each in part], "in the order of the table"
    assert covering(table, pairs, whole=False) == part, "always the same"
    for index, case in enumerate(part):
        others = set().union(*map(pairs, part[:index] + part[index + 1 :]))
        assert not pairs(case) <= others, "none is needless"
    assert covering(table, pairs, whole=True) == table


def test_a_part_is_small_and_cheap():
    table = list(product(range(3), repeat=4))
    assert len(covering(table, pairs, whole=False)) <= 15
    cheap = covering(["dear", "cheap"], lambda case: pairs(["the same"]), {"dear": 8, "cheap": 2}.get, whole=False)
    assert cheap == ["cheap"]


@pytest.mark.parametrize(
    ("cases", "kept"),
    [
        # Each degree with each family, each two axes whatever their degrees, each option with each axis and family.
        ([(Layout(ulysses_degree=2), "flux"), (Layout(ulysses_degree=2), "sd3")], 2),
        ([(Layout(ulysses_degree=2), "flux"), (Layout(ulysses_degree=3), "flux")], 2),
        ([(Layout(ulysses_degree=2), "flux"), (Layout(ulysses_degree=2, ring_degree=2), "flux")], 1),
        ([(Layout(), "flux"), (Layout(ring_degree=2), "flux")], 2),
        ([(Layout(ring_degree=2), "flux"), (Layout(ring_degree=2, weights="sharded"), "flux")], 2),
        ([(Layout(ring_degree=2, weights=each), model) for each in ("whole", "sharded") for model in "abcd"], 8),
    ],
)
def test_what_meets_in_a_layout(cases, kept):
    assert len(covering(cases, lambda case: pairs_of(*case), whole=False)) == kept
