"""No method hangs where a rank must wait for all that it has begun to send and receive before it goes on computing.

So it is on a GPU whose host waits for the whole device: to load a kernel that it uses for the first time, to give back
memory. What is under way must then never need anything that the rank has still to compute.
"""

from unittest import mock

import pytest
from paralleldit.parallel_backend.distributed.axis import Axis, Exchange, Hop
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.weights.stored_linear import StoredLinear
from paralleldit.tests.ranks.stale_families import HEADS, relative_error, sampled
from paralleldit.tests.tiny_models import TINY_MODELS

STARTS = [name for name in vars(Axis) if name.startswith("start_")]

CASES = [
    ("flux dev", Layout(pipefusion_degree=2, num_patches=2)),
    ("flux dev", Layout(pipefusion_degree=2, num_patches=5, cfg_degree=2)),
    ("sd3 medium", Layout(pipefusion_degree=3, num_patches=4, warmup_steps=0)),
    ("sd3 medium", Layout(pipefusion_degree=2, num_patches=3, ulysses_degree=2, ring_degree=2)),
    ("hunyuandit 1.1", Layout(pipefusion_degree=4, num_patches=4)),
    ("hunyuandit 1.1", Layout(pipefusion_degree=3, num_patches=1)),
    ("flux dev", Layout(distrifusion_degree=2, ulysses_degree=2)),
    ("flux dev", Layout(distrifusion_degree=3, refresh="in_turn")),
    ("flux dev", Layout(ulysses_degree=2, ring_degree=2, weights="sharded")),
    ("flux dev", Layout(tensor_degree=2, ring_degree=2)),
]


def sampled_with_stalls(world, model, layout, path):
    """As `sampled`, by ranks that wait for everything under way before each matrix product; and how often they did."""
    under_way: list[Exchange | Hop] = []
    stalls = 0

    def noted(start):
        def begin(axis, *args):
            under_way.append(start(axis, *args))
            return under_way[-1]

        return begin

    def stalled(layer, x):
        nonlocal stalls
        stalls += bool(under_way)
        while under_way:
            under_way.pop().wait()
        return product(layer, x)

    product = StoredLinear.product
    starts = {name: noted(getattr(Axis, name)) for name in STARTS}
    with mock.patch.multiple(Axis, **starts), mock.patch.object(StoredLinear, "product", stalled):
        return sampled(world, model, layout, path), stalls


@pytest.mark.parametrize(("model", "layout"), sorted(CASES, key=lambda case: case[1].ranks), ids=str)
def test_ranks_that_wait_for_all_that_is_under_way_do_not_hang(ranks, tmp_path, model, layout):
    TINY_MODELS[model].make_family(HEADS).transformer.save_pretrained(tmp_path)
    expected = ranks.run(layout.ranks, sampled, model, layout, tmp_path)[0]
    for answer, stalls in ranks.run(layout.ranks, sampled_with_stalls, model, layout, tmp_path):
        assert relative_error(answer, expected) <= 1e-6
        assert stalls
