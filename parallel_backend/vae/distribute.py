"""One direction of a VAE over a batch: the work spread over the ranks of an axis, the results put together on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed.axis import Axis
from ..distributed.row_bands import Bands
from .linear_attention import summed_linear_attention
from .load import LoadedVAE
from .out_of_memory import Check, CountedAxis, CountingBands, check_all_had_memory, unless_out_of_memory
from .tiles import Span, Window, blend_weights, spans, windows

Report = Callable[[int, int], None]
"""`report(done, total)`"""


class Side(NamedTuple):
    """The dims of pictures (or latents) without batch dim: rows in dim `rows`, columns next, `scale` per latent row."""

    rows: int
    scale: int

    def extent(self, x: Tensor) -> Window:
        """All of `x`, in latent rows and columns, as every window is."""
        return Window(Span(0, x.shape[self.rows] // self.scale), Span(0, x.shape[self.rows + 1] // self.scale))

    def cut(self, x: Tensor, window: Window) -> Tensor:
        """The view of `x` under `window`."""
        for dim, span in zip((self.rows, self.rows + 1), window, strict=True):
            x = x.narrow(dim, span.start * self.scale, span.size * self.scale)
        return x

    def shape(self, like: Tensor, window: Window) -> list[int]:
        """The shape of the part inside `window`, given the part `like` inside another window."""
        shape = list(like.shape)
        shape[self.rows], shape[self.rows + 1] = (span.size * self.scale for span in window)
        return shape


class VaeTask(NamedTuple):
    """`compute(vae, part)` turns the part of `batch[i]` inside a window (`taken`) into the same part of the result
    (`given`). Results are in the memory of the VAE's device."""

    vae: LoadedVAE
    batch: Tensor
    compute: Callable[[LoadedVAE, Tensor], Tensor]
    taken: Side
    given: Side

    @property
    def extent(self) -> Window:
        return self.taken.extent(self.batch[0])

    def result(self, index: int, window: Window) -> Tensor:
        return self.compute(self.vae, self.taken.cut(self.batch[index], window)).contiguous()

    def band(self, index: int, window: Window, axis: Axis, rows: Sequence[int], check: Check) -> Tensor | None:
        """This rank's band of a result that all ranks make together; None when its memory is too small for it."""
        part, counted = self.taken.cut(self.batch[index], window), CountedAxis(axis, check)
        with Bands(counted, rows, joint=self.vae.kind.joint), summed_linear_attention(self.vae.module, counted):
            mine = unless_out_of_memory(lambda: self.compute(self.vae, part).contiguous())
        if mine is None:
            # The others still expect halos and statistics of this rank.
            vae, counting = self.vae.on_meta(), CountingBands(axis, check, counted.begun, self.vae.device)
            with Bands(counting, rows, joint=vae.kind.joint), summed_linear_attention(vae.module, counting):
                self.compute(vae, part.to("meta"))
        return mine

    def zeros(self, part: Tensor) -> Tensor:
        """Room for all results in host memory, where `part` is part of one."""
        return torch.zeros(len(self.batch), *self.given.shape(part, self.extent), dtype=part.dtype)


def by_bands(work: VaeTask, axis: Axis, rows: Sequence[int], report: Report, check: Check) -> Tensor | None:
    """Each picture by all ranks together, rank r having `rows[r]` latent rows. The result on the first rank.

    `check` is called now and then.

    Raises `OutOfMemory` on all ranks alike, as do the others here."""
    columns = work.extent.columns
    bands = [Window(Span(end - size, size), columns) for end, size in zip(accumulate(rows), rows, strict=True)]
    whole = None
    for index in range(len(work.batch)):
        mine = work.band(index, bands[axis.rank], axis, rows, check)
        check_all_had_memory(axis, mine is not None)
        assert mine is not None
        shapes = [work.given.shape(mine, band) for band in bands]
        for band, part in zip(bands, _on_first(axis, mine, shapes), strict=False):
            whole = work.zeros(part) if whole is None else whole
            work.given.cut(whole[index], band).copy_(part)
        report(index + 1, len(work.batch))
    return whole


def by_pictures(work: VaeTask, axis: Axis, report: Report) -> Tensor | None:
    """Each picture by one rank. The result on the first rank."""
    return _by_windows(work, axis, [work.extent], {work.extent: torch.ones(1, 1)}, report)


def by_tiles(work: VaeTask, axis: Axis, tile: int, overlap: int, report: Report) -> Tensor | None:
    """Each tile of `tile` latent rows and columns by one rank, blended over `overlap`. The result on the first rank."""
    rows, columns = (spans(span.size, tile, overlap) for span in work.extent)
    row_weights, column_weights = (blend_weights(each, work.given.scale) for each in (rows, columns))
    places = windows(rows, columns)
    weights = {place: row_weights[place.rows][:, None] * column_weights[place.columns] for place in places}
    return _by_windows(work, axis, places, weights, report)


def _by_windows(
    work: VaeTask, axis: Axis, places: list[Window], weights: dict[Window, Tensor], report: Report
) -> Tensor | None:
    """`places` of every picture, all of one size; one per rank at a time."""
    jobs = [(index, place) for index in range(len(work.batch)) for place in places]
    whole = None
    for start in range(0, len(jobs), axis.size):
        batch = jobs[start : start + axis.size]
        mine = None
        if axis.rank < len(batch):
            mine = unless_out_of_memory(partial(work.result, *batch[axis.rank]))
        check_all_had_memory(axis, mine is not None or axis.rank >= len(batch))
        shapes = [list(mine.shape)] * len(batch) if mine is not None else []
        for (index, place), part in zip(batch, _on_first(axis, mine, shapes), strict=False):
            whole = work.zeros(part) if whole is None else whole
            weight = weights[place].reshape(*weights[place].shape, *[1] * (-2 - work.given.rows))
            work.given.cut(whole[index], place).add_(part.cpu() * weight)
        report(start + len(batch), len(jobs))
    return whole


def _on_first(axis: Axis, mine: Tensor | None, shapes: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Yields the ranks' tensors, of `shapes`, one by one on the first rank; yields nothing on any other."""
    if mine is None:
        return
    if axis.rank > 0:
        axis.start_send(mine, 0).wait()
        return
    yield mine
    for rank, shape in enumerate(shapes[1:], start=1):
        yield axis.start_receive(mine.new_empty(shape), rank).wait()
