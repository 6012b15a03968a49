"""How rows are shared over ranks, and what bands refuse because it would not be exact."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from paralleldit.parallel_backend.distributed.row_bands import Bands, band_rows, rows_at_stride


@pytest.mark.parametrize(
    ("rows", "ranks", "multiple", "expected"),
    [
        (16, 4, 4, [4, 4, 4, 4]),
        (24, 4, 4, [4, 4, 8, 8]),
        (13, 2, 4, [8, 5]),
        (17, 4, 4, [4, 4, 4, 5]),
        (7, 4, 4, [0, 0, 4, 3]),
        (1, 3, 4, [0, 0, 1]),
        (5, 1, 4, [5]),
    ],
)
def test_rows_are_shared_in_multiples(rows, ranks, multiple, expected):
    assert band_rows(rows, ranks, multiple) == expected


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_the_bands_of_every_level_make_up_the_whole_and_start_where_those_above_do(ranks):
    for rows in range(1, 70):
        shares = band_rows(rows, ranks, 4)
        assert max(shares) - min(share for share in shares if share) < 8
        for stride in (1, 2, 4):
            level = rows_at_stride(shares, stride)
            assert sum(level) == -(-rows // stride)
            assert [bool(each) for each in level] == [bool(each) for each in shares]


def bands(rank: int) -> Bands:
    """Of a picture over two ranks, without any connection."""
    axis: Any = SimpleNamespace(rank=rank, size=2)
    return Bands(axis, (4, 4))


@pytest.mark.parametrize(
    ("rank", "arguments"),
    [
        (1, {"scale_factor": 2.0, "mode": "bilinear"}),
        (1, {"size": (6, 8)}),
        (0, {"size": (7, 8)}),
        (1, {"size": (7, 8), "mode": "nearest-exact"}),
    ],
    ids=str,
)
def test_upsampling_that_looks_beyond_the_band_is_refused(rank, arguments):
    band = torch.randn(1, 2, 4, 4)
    with bands(rank), pytest.raises(ValueError, match="not local to the band"):
        F.interpolate(band, **arguments)


@pytest.mark.parametrize(("rank", "size"), [(0, (8, 8)), (1, (8, 8)), (1, (7, 8)), (1, (7, 7))])
def test_upsampling_of_bands_is_that_of_the_whole(rank, size):
    whole, rows = torch.randn(1, 2, 8, 4), slice(8 * rank, 8 * rank + size[0])
    expected = F.interpolate(whole, size=(16 if rank == 0 else 8 + size[0], size[1]))[..., rows, :]
    with bands(rank):
        assert torch.equal(F.interpolate(whole[..., 4 * rank : 4 * rank + 4, :], size=size), expected)


def test_a_stride_across_the_edge_of_a_band_is_refused():
    band, weight = torch.randn(1, 2, 3, 4), torch.randn(2, 2, 3, 3)
    with bands(0), pytest.raises(ValueError, match="stride 2 over a band of 3 rows"):
        F.conv2d(band, weight, stride=(2, 2), padding=(1, 1))


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: F.conv_transpose2d(x, x[:2, :, :3, :3], padding=1),
        lambda x: F.avg_pool2d(x, 3, stride=1, padding=1),
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.adaptive_avg_pool2d(x, 2),
        lambda x: F.instance_norm(x),
        lambda x: F.conv_transpose3d(x[:, :, None], x[:2, :, None, :3, :3]),
    ],
)
def test_what_mixes_rows_in_other_ways_is_refused(mix):
    band = torch.randn(2, 2, 4, 4)
    with bands(0), pytest.raises(ValueError, match="mixes rows"):
        mix(band)
