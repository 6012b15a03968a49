"""Any convolutional network over bands of rows: one band a rank, an exchange wherever the network mixes rows. Exact.

The network is not changed: while `Bands` is entered, the functions of torch that mix rows are carried out over the
ranks. `band_rows` says how the rows of a picture are shared, and `rows_at_stride` how they are after downsampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..layout.split import split_sizes
from .axis import Axis, Exchange

Halo = tuple[Tensor | None, Tensor | None]
"""The rows above and below a band; None at an end of the picture, or where none are needed."""

NOT_SHARED = frozenset(
    (
        torch.conv_transpose2d,
        torch.conv_transpose3d,
        F.max_pool2d,
        F.avg_pool2d,
        F.avg_pool3d,
        F.adaptive_avg_pool2d,
        F.instance_norm,
    )
)
"""Functions that mix rows, and that bands have no exchange for."""


def band_rows(rows: int, ranks: int, multiple: int) -> list[int]:
    """How many of a picture's `rows` each rank holds: a multiple of `multiple`, but for what is left over at the end.

    The parts are as even as that allows. A picture with fewer multiples than ranks leaves the first ranks without rows.
    """
    multiples = split_sizes(-(-rows // multiple), ranks)[::-1]
    # The last rank has one of the larger parts: what its last multiple lacks makes the largest part no larger.
    ends = [min(rows, multiple * end) for end in accumulate(multiples, initial=0)]
    return [end - start for start, end in pairwise(ends)]


def rows_at_stride(rows: Sequence[int], stride: int) -> list[int]:
    """How many rows each rank holds where one row is made of `stride` of the picture's, of which rank r has `rows[r]`.

    Downsampling rounds up. `stride` divides the `multiple` of `band_rows`.
    """
    ends = [-(-end // stride) for end in accumulate(rows, initial=0)]
    return [end - start for start, end in pairwise(ends)]


class Bands(TorchFunctionMode):
    """While it is entered, tensors `[…, h, W]` are bands of rows of whole ones, one band per rank of `axis`.

    The functions through which networks mix rows then give each rank its band of what they give for the whole:
    convolutions and padding take the neighbours' rows, group normalisation takes the statistics of the whole, attention
    (if it is `joint`: over all pixels of a picture) the keys and values of all, noise is drawn for the whole. Nearest
    upsampling is local, and checked to be. All else works on each row by itself.

    `rows[r]` are rank r's rows of the picture. Elsewhere in the network a band has a multiple of them, or, after
    downsampling, a part (`rows_at_stride`): at least as many as a convolution takes of a neighbour's. A rank of which
    `rows` says that it has none computes with any rows, of its own making, and gives the others nothing of them.

    Raises `ValueError` for what bands cannot do exactly: strides across the edge of a band, other ways of upsampling,
    transposed convolutions, pooling (`NOT_SHARED`).
    """

    def __init__(self, axis: Axis, rows: Sequence[int], *, joint: bool = False) -> None:
        super().__init__()
        self.axis = axis
        self.rows = rows
        holders = [rank for rank, held in enumerate(rows) if held]
        self._holds = axis.rank in holders
        above = [rank for rank in holders if rank < axis.rank] if self._holds else []
        below = [rank for rank in holders if rank > axis.rank] if self._holds else []
        self._above = above[-1] if above else None
        """The rank whose band is above this one's; None at the top of the picture."""
        self._below = below[0] if below else None
        self._functions: dict[Any, Callable[..., Any]] = {
            torch.conv2d: self._conv2d,
            torch.conv3d: self._conv3d,
            F.pad: self._pad,
            F.interpolate: self._interpolate,
            F.group_norm: self._group_norm,
            torch.randn: self._randn,
        }
        if joint:
            self._functions[F.scaled_dot_product_attention] = self._joint_attention

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in NOT_SHARED:
            raise ValueError(
                f"{func.__name__} mixes rows of a picture, and ranks with a band of rows have no form of it"
            )
        function: Callable[..., Any] = self._functions.get(func) or func
        return function(*args, **(kwargs or {}))

    def _conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> Tensor:
        return self._conv(torch.conv2d, x, weight, bias, stride, padding, dilation, groups)

    def _conv3d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sequence[int] = (1, 1, 1),
        padding: Sequence[int] = (0, 0, 0),
        dilation: Sequence[int] = (1, 1, 1),
        groups: int = 1,
    ) -> Tensor:
        return self._conv(torch.conv3d, x, weight, bias, stride, padding, dilation, groups)

    def _conv(
        self,
        conv: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        above, reach, step = padding[-2], dilation[-2] * (weight.shape[-2] - 1) + 1, stride[-2]
        if above == 0:
            # The rows next to the band have been padded to it before.
            return conv(x, weight, bias, stride, padding, dilation, groups)
        below = reach - step - above
        inward = [*padding[:-2], 0, padding[-1]]
        if step > 1 and self._below is not None and x.shape[-2] % step:
            raise ValueError(f"a convolution of stride {step} over a band of {x.shape[-2]} rows with others below it")
        halo = self._start_halo(x, above, below)
        if step > 1 or x.shape[-2] < reach - 1:
            over, under = halo.wait()
            if self._above is None:
                over = _zeros(x, above)
            if self._below is None:
                under = _zeros(x, above)
            x = torch.cat([part for part in (over, x, under) if part is not None], dim=-2)
            return conv(x, weight, bias, stride, inward, dilation, groups)
        # While the halo travels, the band is computed as if it had no neighbours; then its first and last rows anew.
        out = conv(x, weight, bias, stride, padding, dilation, groups)
        over, under = halo.wait()
        if over is not None:
            edge = torch.cat((over, x[..., : reach - 1, :]), dim=-2)
            out[..., :above, :] = conv(edge, weight, bias, stride, inward, dilation, groups)
        if under is not None:
            edge = torch.cat((x[..., 1 - reach :, :], under), dim=-2)
            out[..., -below:, :] = conv(edge, weight, bias, stride, inward, dilation, groups)
        return out

    def _pad(self, x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
        above, below = (pad[2], pad[3]) if len(pad) >= 4 else (0, 0)
        if not (above or below):
            return F.pad(x, pad, mode, value)
        halo = self._start_halo(x, above, below)
        out = F.pad(x, pad, mode, value)
        sideways = [*pad[:2], 0, 0, *pad[4:]]
        over, under = halo.wait()
        if over is not None:
            out[..., :above, :] = F.pad(over, sideways, mode, value)
        if under is not None:
            out[..., -below:, :] = F.pad(under, sideways, mode, value)
        return out

    def _interpolate(
        self,
        x: Tensor,
        size: Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
        mode: str = "nearest",
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Nearest upsampling by a whole number, or to a `size` `[…, rows of this band, W]`.

        The last band may lack one row: over the whole picture, too, row i is then made of row i // factor.
        """
        rows = x.shape[-2]
        out = F.interpolate(x, size, scale_factor, mode, *args, **kwargs)
        lacking = -out.shape[-2] % rows
        may_lack = mode == "nearest" and self._below is None
        if mode not in ("nearest", "nearest-exact") or lacking > may_lack:
            raise ValueError(
                f"{mode} upsampling of a band from {rows} to {out.shape[-2]} rows is not local to the band"
            )
        return out

    def _group_norm(
        self,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        """`x` `[B, C, …]`. Statistics are taken in fp32 and combined in fp64, whatever the dtype of `x` is."""
        batch, channels = x.shape[:2]
        x = x.contiguous()
        rows = x.view(batch, num_groups, -1, x.shape[-1])
        sums = rows.sum(-1, dtype=torch.float32).double()
        squares = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).double().square()
        count = sums.new_full((batch, num_groups), rows[0, 0].numel())
        own = torch.stack([sums.sum(-1), squares.sum(-1), count])
        total, power, count = self.axis.all_reduce(own if self._holds else torch.zeros_like(own))
        mean = total / count
        variance = (power / count - mean.square()).clamp_(min=0)
        # Normalisation by given statistics, of every channel of every picture by its own.
        center, spread = (
            each.float().repeat_interleave(channels // num_groups, 1).flatten() for each in (mean, variance)
        )
        scale, shift = (None if each is None else each.float().repeat(batch) for each in (weight, bias))
        return F.batch_norm(x.view(1, batch * channels, -1), center, spread, scale, shift, eps=eps).view_as(x)

    def _randn(self, size: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
        """`size` `[…, h, W]`: this band of the noise of the whole, for which all ranks draw the same numbers."""
        *outer, height, width = size
        times = height // self.rows[self.axis.rank]
        whole = torch.randn((*outer, times * sum(self.rows), width), *args, **kwargs)
        return whole.narrow(-2, times * sum(self.rows[: self.axis.rank]), height)

    def _joint_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """`[…, S, D]`, the rows of every frame being cut. `attn_mask` `[…, S, S]` may differ by frame, not by row."""
        tokens = key.shape[-2]
        sizes = [tokens // self.rows[self.axis.rank] * rows for rows in self.rows]
        key, value = (self.axis.all_gather(each, sizes, dim=key.ndim - 2).contiguous() for each in (key, value))
        if attn_mask is not None:
            # Every rank has as many frames: a token's place among its rank's tokens gives its frame.
            places = [torch.arange(size, device=attn_mask.device) * tokens // size for size in sizes]
            attn_mask = attn_mask[..., torch.cat(places)]
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)

    def _start_halo(self, x: Tensor, above: int, below: int) -> Arriving:
        """Give both neighbours what they need of `x`'s rows, and take `above` and `below` rows of theirs."""
        axis, rank = self.axis, self.axis.rank
        row = x[..., :1, :].numel()
        given, taken = [0] * axis.size, [0] * axis.size
        edges = [x.new_empty(0)]
        if self._above is not None:
            given[self._above], taken[self._above] = below * row, above * row
            edges.append(x[..., :below, :].flatten())
        if self._below is not None:
            given[self._below], taken[self._below] = above * row, below * row
            edges.append(x[..., x.shape[-2] - above :, :].flatten())
        exchange = axis.start_all_to_all(torch.cat(edges), given, taken)
        return Arriving(exchange, x.shape, sum(taken[:rank]), sum(taken[rank:]))


class Arriving:
    """Rows of both neighbours, under way."""

    def __init__(self, exchange: Exchange, shape: Sequence[int], above: int, below: int) -> None:
        self._exchange = exchange
        self._shape = shape
        self._sizes = above, below

    def wait(self) -> Halo:
        *outer, _, width = self._shape
        over, under = (
            part.view(*outer, -1, width) if part.numel() else None for part in self._exchange.wait().split(self._sizes)
        )
        return over, under


def _zeros(x: Tensor, rows: int) -> Tensor:
    return x.new_zeros(*x.shape[:-2], rows, x.shape[-1])
