"""The memory that `cli plan --memory` reckons is what loading has been measured to take (docs/MEASURED.md)."""

import pytest
from paralleldit.cli.commands.plan import MODELS
from paralleldit.cli.commands.plan_memory import shapes_of, weight_bytes
from paralleldit.parallel_backend.layout.layout import Layout

MEASURED = [
    (Layout(), 1.0),
    (Layout(ulysses_degree=2), 1.0),
    (Layout(tensor_degree=2), 0.502),
    (Layout(tensor_degree=4), 0.254),
    (Layout(ulysses_degree=2, weights="sharded"), 0.559),
    (Layout(ulysses_degree=4, weights="sharded"), 0.311),
    (Layout(tensor_degree=2, ulysses_degree=2, weights="sharded"), 0.282),
    (Layout(pipefusion_degree=2), 0.514),
    (Layout(pipefusion_degree=4), 0.262),
    (Layout(pipefusion_degree=2, stage_blocks="even"), 0.667),
    (Layout(tensor_degree=2, pipefusion_degree=2), 0.259),
]


@pytest.fixture(scope="module")
def flux():
    spec, config = MODELS["flux-dev"]
    return spec, shapes_of(spec, config)


@pytest.mark.parametrize(("layout", "share"), MEASURED, ids=str)
def test_the_share_of_the_model_on_the_fullest_rank_is_the_measured_one(flux, layout, share):
    assert weight_bytes(layout, *flux) / weight_bytes(Layout(), *flux) == pytest.approx(share, abs=0.006)


def test_flux_has_twelve_billion_parameters(flux):
    assert weight_bytes(Layout(), *flux) == pytest.approx(23.8e9, rel=0.005)
    assert weight_bytes(Layout(weights="offloaded"), *flux) < 2e9
