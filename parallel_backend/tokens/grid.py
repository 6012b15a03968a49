"""Latents as tokens: one for each patch of cells, frame by frame, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Patch = tuple[int, int, int]
"""Frames, rows and columns of cells to a token."""

CutAxis = Literal["frames", "rows"]
"""The axis of a grid along which PipeFusion cuts it into patches."""


@dataclass(frozen=True)
class Grid:
    """How many frames, rows and columns of tokens a latent has. A picture has one frame."""

    frames: int
    rows: int
    columns: int

    @classmethod
    def of(cls, shape: Sequence[int], patch: Patch) -> Grid:
        """The grid of a latent of `shape` `[H, W]` or `[T, H, W]`, without batch and channels; half patches count."""
        cells = (1, *shape) if len(shape) == 2 else shape
        return cls(*(-(-extent // size) for extent, size in zip(cells, patch, strict=True)))

    @property
    def count(self) -> int:
        return self.frames * self.rows * self.columns

    def positions(self, device: torch.device) -> Tensor:
        """The frame, row and column of each token, `[S, 3]`."""
        axes = (torch.arange(extent, device=device) for extent in (self.frames, self.rows, self.columns))
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)

    def cut_axis(self, patches: int) -> CutAxis:
        """Frames where there are as many as `patches`, else rows."""
        return "frames" if self.frames > 1 and self.frames >= patches else "rows"

    def extent(self, axis: CutAxis) -> int:
        return self.frames if axis == "frames" else self.rows

    def ranges(self, axis: CutAxis, start: int, stop: int) -> list[range]:
        """The tokens of `start` to `stop` along an axis: one run where it is the slowest, else one a frame."""
        frame = self.rows * self.columns
        if axis == "frames":
            return [range(start * frame, stop * frame)]
        firsts = range(0, self.count, frame) if self.count else ()
        return [range(first + start * self.columns, first + stop * self.columns) for first in firsts]


def tokenise(latent: Tensor, patch: Patch, *, channels_last: bool = False) -> Tensor:
    """`[B, C, H, W]` or `[B, C, T, H, W]` -> `[B, S, C * pt * ph * pw]`, frame by frame and row by row.

    The extents need not be multiples of the patch: as in the reference implementations, a half patch at a border takes
    its other half from the opposite border. `channels_last`: as in `LatentSpec`.
    """
    cells = latent.unsqueeze(2) if latent.ndim == 4 else latent
    missing = [-extent % size for extent, size in zip(cells.shape[2:], patch, strict=True)]
    if any(missing):
        cells = F.pad(cells, (0, missing[2], 0, missing[1], 0, missing[0]), mode="circular")
    for dim, size in zip((2, 4, 6), patch, strict=True):
        cells = cells.unflatten(dim, (-1, size))
    within = (3, 5, 7, 1) if channels_last else (1, 3, 5, 7)
    return cells.permute(0, 2, 4, 6, *within).flatten(4).flatten(1, 3)


def untokenise(tokens: Tensor, shape: Sequence[int], patch: Patch, *, channels_last: bool = False) -> Tensor:
    """The inverse of `tokenise`: `[B, S, C * pt * ph * pw]` -> `[B, C, *shape]`, `shape` being `(T,) H, W`."""
    grid = Grid.of(shape, patch)
    frames, rows, columns = grid.frames, grid.rows, grid.columns
    channels = tokens.shape[2] // prod(patch)
    inner = (*patch, channels) if channels_last else (channels, *patch)
    cells = tokens.reshape(tokens.shape[0], frames, rows, columns, *inner)
    order = (0, 7, 1, 4, 2, 5, 3, 6) if channels_last else (0, 4, 1, 5, 2, 6, 3, 7)
    cells = cells.permute(*order).reshape(
        tokens.shape[0], channels, frames * patch[0], rows * patch[1], columns * patch[2]
    )
    if len(shape) == 2:
        return cells[:, :, 0, : shape[0], : shape[1]]
    return cells[:, :, : shape[0], : shape[1], : shape[2]]


@dataclass(frozen=True)
class Packing:
    """How the latents of a run are one tensor for its sampler: a single one is itself, several are `[B, 1, N]`.

    `shapes`: of each latent, by name, without the batch. ComfyUI packs latents of video and sound alike.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def unpack(self, x: Tensor) -> dict[str, Tensor]:
        """The latents, by name, as views. A single latent may be of another size (an area, a strip)."""
        if len(self.shapes) == 1:
            return {name: x for name in self.shapes}
        parts = x.flatten(1).split([prod(shape) for shape in self.shapes.values()], dim=1)
        return {name: part.view(len(x), *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def pack(self, latents: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `unpack`."""
        if len(self.shapes) == 1:
            return next(iter(latents.values()))
        return torch.cat([latents[name].flatten(1) for name in self.shapes], dim=1).unsqueeze(1)
