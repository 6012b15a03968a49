"""The places of a picture's tiles, and how they blend."""

from __future__ import annotations

from itertools import product
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor


class Tiling(NamedTuple):
    """Side of a tile, and what neighbouring tiles share at least, in pixels. `tile_size` 0: no tiles."""

    tile_size: int
    overlap: int


NO_TILES = Tiling(0, 64)


class Span(NamedTuple):
    """A stretch of latent rows or columns."""

    start: int
    size: int


class Window(NamedTuple):
    """A tile: its rows and its columns."""

    rows: Span
    columns: Span


def cropped(x: Tensor, multiple: int, rows: int) -> Tensor:
    """The middle of `x` whose height (dim `rows`) and width (the next) are multiples of `multiple`."""
    for dim in (rows, rows + 1):
        excess = x.shape[dim] % multiple
        x = x.narrow(dim, excess // 2, x.shape[dim] - excess)
    return x


def spans(extent: int, tile: int, overlap: int) -> list[Span]:
    """The fewest spans of one size, `tile`, that cover `extent` evenly and share at least `overlap` with the next."""
    if extent <= tile:
        return [Span(0, extent)]
    hops = ceil((extent - tile) / (tile - overlap))
    return [Span(hop * (extent - tile) // hops, tile) for hop in range(hops + 1)]


def windows(rows: list[Span], columns: list[Span]) -> list[Window]:
    """The tiles that are in both, row by row."""
    return [Window(*window) for window in product(rows, columns)]


def blend_weights(stretches: list[Span], scale: int) -> dict[Span, Tensor]:
    """Per span, its share of each of its pixels `[size * scale]`: less towards inner ends, 1 in sum over all spans."""
    last = stretches[-1]
    extent = (last.start + last.size) * scale
    heights = {}
    for span in stretches:
        pixel = torch.arange(span.size * scale, dtype=torch.float32)
        height = torch.full_like(pixel, float(extent))
        if span != stretches[0]:
            height = torch.minimum(height, pixel + 1)
        if span != last:
            height = torch.minimum(height, span.size * scale - pixel)
        heights[span] = height
    total = torch.zeros(extent)
    for span, height in heights.items():
        total[_pixels(span, scale)] += height
    return {span: height / total[_pixels(span, scale)] for span, height in heights.items()}


def _pixels(span: Span, scale: int) -> slice:
    return slice(span.start * scale, (span.start + span.size) * scale)
