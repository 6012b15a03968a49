"""Rotary position embedding (RoFormer, arXiv 2104.09864) from coordinates, of whole heads or parts of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .plan import Places


def rotations(cosines: Tensor, sines: Tensor) -> Tensor:
    """Cosine and sine of every angle, fp32 `[S, 1, D / 2, 2]`, from tables `[S, D]` in which each stands twice."""
    return torch.stack((cosines[:, ::2], sines[:, ::2]), dim=-1).float().unsqueeze(1)


def rotations_at(coordinates: Tensor, widths: Sequence[int], theta: float = 10000.0) -> Tensor:
    """Computes `rotations` at `coordinates` `[S, axes]`; `widths`: how many channels of a head belong to each axis.

    Angles are computed in fp64: a coordinate may be a fraction or negative, and has no end.
    """
    angles = []
    for axis, width in enumerate(widths):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=coordinates.device) / width
        angles.append(coordinates[:, axis, None].double() * (1.0 / theta**exponents))
    angle = torch.cat(angles, dim=1)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float().unsqueeze(1)


@dataclass(frozen=True)
class Rotary:
    """How the heads of some tokens are turned: `table` `[S, 1 or H, D' / 2, 2]`, of which D' channels of a head turn.

    `halves`: the channels, in order, in chunks of such widths, a chunk's first half paired with its second; by default
    neighbouring channels are pairs.
    """

    table: Tensor
    halves: tuple[int, ...] = ()

    def of(self, places: Places) -> Rotary:
        """The rotary of the tokens at these places."""
        return replace(self, table=self.table[places])

    def heads(self, own: range) -> Rotary:
        """The rotary of these heads, where each has angles of its own."""
        return self if self.table.shape[1] == 1 else replace(self, table=self.table[:, own.start : own.stop])

    def rotate(self, x: Tensor) -> Tensor:
        """Turn the pairs of `x` `[B, S, H, D]`, in fp32."""
        width = 2 * self.table.shape[2]
        turned = x if width == x.shape[-1] else x[..., :width]
        if self.halves:
            chunks = turned.split(self.halves, dim=-1)
            turned = torch.cat([each.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) for each in chunks], dim=-1)
        turned = rotate(turned, self.table)
        if self.halves:
            chunks = turned.split(self.halves, dim=-1)
            turned = torch.cat([each.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for each in chunks], dim=-1)
        return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring pairs of `x` `[B, S, H, D]` by `table` `[S, 1 or H, D / 2, 2]`, in fp32."""
    pairs = x.float().unflatten(-1, (x.shape[-1] // 2, 2))
    if torch.compiler.is_compiling():
        # The compiler makes one kernel of this, and none of complex numbers.
        (real, imaginary), (cosine, sine) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2).to(x.dtype)
