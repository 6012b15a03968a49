"""The strips of a run's latent that PipeFusion's patches cover: rows, or frames of a video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..layout.split import split_sizes
from .grid import CutAxis, Grid, Packing, Patch

DIMS: Mapping[CutAxis, tuple[int, int]] = {"frames": (-3, 0), "rows": (-2, 1)}
"""The latent's dim that is cut for each cut axis, and the axis' place in a `Patch`."""


class Strips:
    """Cuts whole latents, or what is like them, into the strips of so many `patches`, and puts them together.

    A latent is cut along the axis along which its tokens are (`Grid.cut_axis`). Of several latents a strip has a part
    of each, packed like the whole.
    """

    def __init__(self, packing: Packing, patch_sizes: Mapping[str, Patch], patches: int) -> None:
        self._packing = packing
        self._whole = range(patches)
        self._edges: dict[str, tuple[int, list[int]]] = {}
        for name, shape in packing.shapes.items():
            grid = Grid.of(shape[1:], patch_sizes[name])
            axis = grid.cut_axis(patches)
            dim, place = DIMS[axis]
            cells = shape[dim]
            sizes = split_sizes(grid.extent(axis), patches)
            edges = [min(edge * patch_sizes[name][place], cells) for edge in accumulate(sizes, initial=0)]
            self._edges[name] = dim, edges

    def __len__(self) -> int:
        return len(self._whole)

    def cut(self, whole: Tensor, patches: Sequence[int]) -> Tensor:
        """The strips of neighbouring `patches`; a view where there is one latent."""
        if len(patches) == len(self._whole):
            return whole
        parts = {}
        for name, latent in self._packing.unpack(whole).items():
            dim, edges = self._edges[name]
            start, stop = edges[patches[0]], edges[patches[-1] + 1]
            # What is the same everywhere along a dim is so in every strip.
            parts[name] = latent if latent.shape[dim] == 1 != edges[-1] else latent.narrow(dim, start, stop - start)
        return self._packing.pack(parts)

    def shape(self, shape: Sequence[int], patches: Sequence[int]) -> tuple[int, ...]:
        """The shape of `cut` of a tensor of `shape`."""
        return tuple(self.cut(torch.empty(tuple(shape), device="meta"), patches).shape)

    def latents(self, strip: Tensor, patches: Sequence[int]) -> dict[str, Tensor]:
        """The latents' parts in a strip, by name."""
        return self._of(patches).unpack(strip)

    def pack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `latents`."""
        return self._packing.pack(parts)

    def put(self, whole: Tensor, patches: Sequence[int], strip: Tensor) -> None:
        """Write `strip` into `whole`, where `patches` are."""
        targets = self._packing.unpack(whole)
        for name, part in self.latents(strip, patches).items():
            dim, edges = self._edges[name]
            start, stop = edges[patches[0]], edges[patches[-1] + 1]
            targets[name].narrow(dim, start, stop - start).copy_(part)

    def join(self, strips: Sequence[Tensor]) -> Tensor:
        """Neighbouring strips, each of one patch, as one: all of them, or a single one."""
        if len(strips) == 1:
            return strips[0]
        by_patch = [self.latents(strip, [patch]) for patch, strip in zip(self._whole, strips, strict=True)]
        return self._packing.pack(
            {name: torch.cat([parts[name] for parts in by_patch], dim=dim) for name, (dim, _) in self._edges.items()}
        )

    def _of(self, patches: Sequence[int]) -> Packing:
        if len(self._packing.shapes) == 1:
            return self._packing
        shapes = {}
        for name, shape in self._packing.shapes.items():
            dim, edges = self._edges[name]
            own = list(shape)
            own[dim] = edges[patches[-1] + 1] - edges[patches[0]]
            shapes[name] = tuple(own)
        return Packing(shapes)
