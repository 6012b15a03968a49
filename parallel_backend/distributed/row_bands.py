"""The one mechanism for all VAEs and directions: a band of rows per rank, and an exchange wherever rows are mixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .axis import Axis, Exchange

Halo = tuple[Tensor | None, Tensor | None]
"""The rows above and below a band; None at an end of the picture, or where none are needed."""


class Bands(TorchFunctionMode):
    """While it is entered, tensors `[…, h, W]` are bands of rows of whole ones, one band per rank of `axis`.

    The functions through which autoencoders mix rows then give each rank its band of what they give for the whole:
    convolutions and padding take the neighbours' rows, group normalisation takes the statistics of the whole, attention
    (if it is `joint`: over all pixels of a picture) the keys and values of all, noise is drawn for the whole. All else
    works on each row by itself.

    `rows[r]` are rank r's rows of the latent. Where a tensor has n times the rows, rank r's band has `n * rows[r]`, at
    least as many as a convolution takes of a neighbour's band.
    """

    def __init__(self, axis: Axis, rows: Sequence[int], *, joint: bool) -> None:
        super().__init__()
        self.axis = axis
        self.rows = rows
        self._functions: dict[Any, Callable[..., Any]] = {
            torch.conv2d: self._conv2d,
            torch.conv3d: self._conv3d,
            F.pad: self._pad,
            F.group_norm: self._group_norm,
            torch.randn: self._randn,
        }
        if joint:
            self._functions[F.scaled_dot_product_attention] = self._attention

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
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
        above, reach, step = padding[-2], weight.shape[-2], stride[-2]
        if above == 0:
            # Whatever is beside the band has been padded to it before.
            return conv(x, weight, bias, stride, padding, dilation, groups)
        below = reach - step - above
        inward = [*padding[:-2], 0, padding[-1]]
        halo = self._start_halo(x, above, below)
        if step > 1 or x.shape[-2] < reach - 1:
            over, under = halo.wait()
            x = _stack(
                over if over is not None else _zeros(x, above), x, under if under is not None else _zeros(x, below)
            )
            return conv(x, weight, bias, stride, inward, dilation, groups)
        # While the halo travels, the band is computed as if nothing were beside it; then its first and last rows anew.
        out = conv(x, weight, bias, stride, padding, dilation, groups)
        over, under = halo.wait()
        if over is not None:
            edge = _stack(over, x[..., : reach - 1, :])
            out[..., :above, :] = conv(edge, weight, bias, stride, inward, dilation, groups)
        if under is not None:
            edge = _stack(x[..., 1 - reach :, :], under)
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
        total, power, count = self.axis.all_reduce(torch.stack([sums.sum(-1), squares.sum(-1), count]))
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

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """`[…, S, D]`, the rows of every frame being cut. `attn_mask` `[…, S, S]` may tell frames apart, not rows."""
        tokens = key.shape[-2]
        sizes = [tokens // self.rows[self.axis.rank] * rows for rows in self.rows]
        key, value = (self.axis.all_gather(each, sizes, dim=key.ndim - 2).contiguous() for each in (key, value))
        if attn_mask is not None:
            # Every rank has as many frames: a token's place among its rank's tokens tells its frame.
            places = [torch.arange(size, device=attn_mask.device) * tokens // size for size in sizes]
            attn_mask = attn_mask[..., torch.cat(places)]
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)

    def _start_halo(self, x: Tensor, above: int, below: int) -> Arriving:
        """Give both neighbours what they need of `x`'s rows, and take `above` and `below` rows of theirs."""
        axis, rank = self.axis, self.axis.rank
        row = x[..., :1, :].numel()
        given, taken = [0] * axis.size, [0] * axis.size
        edges = []
        if rank > 0:
            given[rank - 1], taken[rank - 1] = below * row, above * row
            edges.append(x[..., :below, :].flatten())
        if rank < axis.size - 1:
            given[rank + 1], taken[rank + 1] = above * row, below * row
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


def _stack(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=-2)


def _zeros(x: Tensor, rows: int) -> Tensor:
    return x.new_zeros(*x.shape[:-2], rows, x.shape[-1])
