"""Rows of tokens with their neighbours: what a convolution over a grid needs of other ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed.axis import Axis


def edges_of(runs: Sequence[Tensor], row: int) -> Tensor:
    """The first and last row of each run `[B, S, c]` of whole rows, zeros of an empty one: `[runs, B, 2, row, c]`."""
    ends = [
        torch.stack((run[:, :row], run[:, -row:]), dim=1)
        if run.shape[1]
        else run.new_zeros((len(run), 2, row, run.shape[2]))
        for run in runs
    ]
    return torch.stack(ends)


def gathered(edges: Tensor, axes: Sequence[Axis]) -> Tensor:
    """The rows of all ranks, `[ranks, runs, B, 2, row, c]`; of the `axes` the first changes fastest with the rank."""
    whole = edges.unsqueeze(0)
    for axis in axes:
        whole = axis.all_gather(whole.contiguous(), [len(whole)] * axis.size, dim=0)
    return whole


def with_halo(run: Tensor, place: int, edges: Sequence[Tensor] | Tensor, sizes: Sequence[int]) -> Tensor:
    """`run` `[B, S, c]` with the row before it and the row after it; zeros at the ends of the grid.

    `edges[i]` `[B, 2, row, c]`: of all runs, in the order of the grid, of which this one is number `place`;
    `sizes[i]`: their tokens. Empty ones have no edges.
    """
    held = [number for number, size in enumerate(sizes) if size]
    before = next((edges[number][:, 1] for number in reversed(held) if number < place), None)
    after = next((edges[number][:, 0] for number in held if number > place), None)
    zeros = torch.zeros_like(edges[place][:, 0])
    return torch.cat((zeros if before is None else before, run, zeros if after is None else after), dim=1)
