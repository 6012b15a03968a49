"""Row parallelism: every rank carries a band of rows through a plain network. Exact.

Convolutions take the neighbouring rows and group norms the sums of all ranks (`row_bands`), self-attention spans the
rows of all ranks by Ulysses, ring or both (`attention`), cross-attention and all else is local to a band.

What a rank sends in one evaluation of a network of `c` convolutions, `g` group norms and self-attention sites:
2 rows per convolution of 3 x 3 (1 where it halves the rows), 3 numbers per picture and group and norm, all-reduced, and
what the attention sends of its tokens: 4 all-to-alls with Ulysses, 2 (N - 1) hops of keys and values with a ring.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from ..attention.site import Attention, KeySet
from ..distributed.axis import Axis
from ..distributed.row_bands import Bands, band_rows, rows_at_stride
from ..families.condition import Condition
from ..families.plain import PlainFamily, Site


class RowParallel:
    """Predicts for whole pictures, each rank computing a band of rows of the whole network."""

    def __init__(self, family: PlainFamily, axis: Axis, attention: Attention) -> None:
        """`axis`: the ranks that `attention` spans, Ulysses peers first."""
        self.family = family
        self.axis = axis
        self.attention = attention

    def begin_step(self, step: int) -> None:
        """Sets the step of the run that later predictions belong to. Exact methods do not use it."""

    def finish(self) -> None:
        """The run is over, however it ended; all ranks leave it at the same step."""

    def forget(self) -> None:
        """This rank leaves the run, wherever the others are."""

    def outputs_of(self, latent: Tensor, condition: Condition) -> int:
        """How many outputs a layer of the network's first level has on each rank, for one picture of `latent`."""
        height, width = latent.shape[-2:]
        return -(-height * width * self.family.channels // self.axis.size)

    def predict(
        self, latent: Tensor, timestep: Tensor, condition: Condition, next_timestep: Tensor | None = None
    ) -> Tensor:
        """The network's output for `latent` `[B, C, H, W]` at `timestep` `[B]`, whole and equal on every rank.

        Every rank holds a multiple of the family's `row_multiple` of rows, but for the last ones of the picture; of a
        picture too short for that some ranks hold none.
        """
        family, axis = self.family, self.axis
        if axis.size == 1:
            return family.forward(latent, timestep, condition)
        height, width = latent.shape[-2:]
        rows = band_rows(height, axis.size, family.row_multiple)
        own = rows[axis.rank]

        def attend(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
            columns = -(-width // site.stride)
            lengths = [count * columns for count in rows_at_stride(rows, site.stride)]
            self.attention.set_lengths({"image": lengths})
            held = lengths[axis.rank]
            value, key, query = (self.attention.send(each[:, :held], ("image",)) for each in (v, k, q))
            attended = self.attention((site.name,), query, KeySet(key, value))
            return attended if own else torch.zeros_like(q)

        end = list(accumulate(rows))[axis.rank]
        # A rank without rows computes with others that nobody sees, to take part in what the ranks do together.
        band = latent[..., end - own : end, :] if own else latent[..., : family.row_multiple, :]
        with Bands(axis, rows), family.attending(attend):
            output = family.forward(band, timestep, condition)
        return axis.all_gather(output[..., :own, :], rows, dim=output.ndim - 2)
