"""Tensor-parallel ranks cut layers by groups of heads and by features, and norm over the heads of all."""

from __future__ import annotations

import pytest
import torch
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.families.spec import HEADS, Cut, HeadGroup
from paralleldit.parallel_backend.layout.model_part import Share
from paralleldit.parallel_backend.strategies.tensor import TensorParallel
from paralleldit.parallel_backend.weights.tensor_cuts import TensorCuts
from torch import nn

GROUPS = {
    **HEADS,
    "kv": HeadGroup("num_key_value_heads", "attention_head_dim", "heads"),
    "gates": HeadGroup("gates", 1),
}
DIM = 4


def cuts(heads: int, kv: int, index: int, count: int, *table: Cut) -> TensorCuts:
    config = {"num_attention_heads": heads, "attention_head_dim": DIM, "num_key_value_heads": kv, "gates": heads}
    return TensorCuts(table, GROUPS, config, Share(index, count))


@pytest.mark.parametrize(
    ("heads", "kv", "count", "own", "serves"),
    [
        # whole key and value heads where there are enough
        (8, 4, 2, [range(0, 2), range(2, 4)], [[0, 0, 1, 1], [0, 0, 1, 1]]),
        # fewer than ranks: repeated
        (4, 2, 4, [range(0, 1), range(0, 1), range(1, 2), range(1, 2)], [[0], [0], [0], [0]]),
        (4, 1, 3, [range(0, 1)] * 3, [[0, 0], [0], [0]]),
        # a border within what a head serves
        (6, 2, 4, [range(0, 1), range(0, 2), range(1, 2), range(1, 2)], [[0, 0], [0, 1], [0], [0]]),
        (4, 4, 2, [range(0, 2), range(2, 4)], [[0, 1], [0, 1]]),
        # ranks without a query head
        (2, 1, 3, [range(0, 1), range(0, 1), range(2, 2)], [[0], [0], []]),
    ],
)
def test_ranks_have_the_heads_that_serve_their_query_heads(heads, kv, count, own, serves) -> None:
    shares = [cuts(heads, kv, index, count).heads for index in range(count)]
    assert [list(share.own("kv")) for share in shares] == [list(each) for each in own]
    assert [share.serves("kv") for share in shares] == serves
    assert [head for share in shares for head in share.counted("kv")] == list(range(kv))


def test_heads_that_do_not_serve_equally_many_are_refused() -> None:
    with pytest.raises(UserError, match="6 heads cannot be served by 4 kv"):
        cuts(6, 4, 0, 2)


@pytest.mark.parametrize(
    ("spans", "size", "expected"),
    [
        (("heads",), 12, [range(0, 8), range(8, 12)]),
        (("gates",), 3, [range(0, 2), range(2, 3)]),
        (("kv",), 4, [range(0, 4), range(0, 4)]),
        # queries, keys and values stacked, and a gate of every head
        (
            ("heads", "kv", "kv", "gates"),
            23,
            [[*range(8), *range(12, 20), 20, 21], [*range(8, 12), *range(12, 20), 22]],
        ),
        # who gets more of the heads gets less of the features
        (("heads", "features"), 12 + 48, [[*range(8), *range(12, 28)], [*range(8, 12), *range(28, 60)]]),
    ],
)
def test_a_dim_is_cut_span_by_span(spans, size, expected) -> None:
    for index, places in enumerate(expected):
        slices = cuts(3, 1, index, 2, Cut("layer", "column", spans)).slices("blocks.0.layer.weight", (size, 5))
        assert slices is not None
        assert [place for part in slices.ranges for place in part] == list(places)


@pytest.mark.parametrize(
    ("heads", "kv", "count", "group"),
    [(4, 4, 2, "heads"), (3, 3, 2, "heads"), (2, 2, 3, "heads"), (4, 2, 4, "kv"), (6, 2, 4, "kv")],
)
@pytest.mark.parametrize("eps", [1e-6, None])
def test_a_norm_over_ranks_is_the_norm_of_the_whole(heads, kv, count, group, eps) -> None:
    generator = torch.Generator().manual_seed(3)
    width = DIM * (heads if group == "heads" else kv)
    whole = nn.RMSNorm(width, eps=eps)
    whole.weight.data = torch.randn(width, generator=generator)
    x = torch.randn(2, 7, width, generator=generator)
    squares: list[torch.Tensor] = []

    class Summed:
        """An axis whose ranks come one after the other, twice."""

        def all_reduce(self, own):
            squares.append(own)
            return sum(squares[:count])

    ranks = []
    for index in range(count):
        own = cuts(heads, kv, index, count, Cut("norm", "norm", (group,)))
        slices = own.slices("blocks.0.norm.weight", (width,))
        model = nn.Module()
        model.blocks = nn.ModuleList([nn.ModuleDict({"norm": nn.RMSNorm(width, eps=eps)})])
        model.blocks[0]["norm"].weight = nn.Parameter(slices.of(whole.weight.data))
        parallel = TensorParallel(model, own)
        parallel.axis = Summed()
        ranks.append((model.blocks[0]["norm"], slices.of(x.movedim(-1, 0)).movedim(0, -1), slices))
    for norm, part, _ in ranks:
        norm(part)
    for norm, part, slices in ranks:
        expected = slices.of(whole(x).movedim(-1, 0)).movedim(0, -1)
        torch.testing.assert_close(norm(part), expected, rtol=1e-6, atol=1e-6)
