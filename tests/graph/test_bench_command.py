"""`cli bench`: the layouts that it measures, and its table. Its runs: test_real_ranks.py."""

from __future__ import annotations

import pytest
import torch
from paralleldit.cli.commands.bench import Measured, table, usual_layouts
from paralleldit.parallel_backend.layout.fitting import check_layout
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.layout.rules import RunFacts


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_usual_layouts_are_of_as_many_ranks(ranks, guided):
    layouts = usual_layouts(ranks, guided=guided)
    assert len(set(layouts)) == len(layouts) > 0
    for layout in layouts:
        check_layout(layout, RunFacts(ranks=ranks))
    assert any(layout.cfg_degree == 2 for layout in layouts) == (guided and ranks % 2 == 0)
    assert any(layout == Layout(ulysses_degree=ranks) for layout in layouts)


def test_rows_are_medians_beside_the_first():
    latent = torch.ones(1, 4)
    first = Measured(seconds=[4.0, 2.0, 9.0], used=2_000_000_000, latent=latent)
    other = Measured(seconds=[2.0, 1.0, 3.0], sent=3e6, used=1_000_000_000, latent=latent * 1.5)
    *_, row_of_first, row = table({"one rank": first, "ring2": other})
    assert row_of_first == "| one rank | 4.000 | 2.000 | 1.00 | 0.0 | 2.00 | 0.0e+00 |"
    assert row == "| ring2 | 2.000 | 1.000 | 2.00 | 3.0 | 1.00 | 5.0e-01 |"
