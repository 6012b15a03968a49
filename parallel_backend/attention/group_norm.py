"""Group normalisation (arXiv 1803.08494) over the tokens of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .site import Attention, SiteId


def group_norm(attention: Attention, site: SiteId, stream: str, x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`norm` of this rank's tokens `x` `[B, S, C]` of a stream, by the statistics of all of its tokens, in fp32."""
    groups = x.float().unflatten(2, (norm.num_groups, -1))
    count = groups.new_tensor(float(groups.shape[3])).expand(len(x), norm.num_groups)

    def sums(own: slice) -> Tensor:
        part = groups[:, own]
        return torch.stack((count * part.shape[1], part.sum((1, 3))))

    numbers, total = attention.total((*site, "mean"), stream, sums)
    mean = total / numbers
    centred = groups - mean[:, None, :, None]
    squares = attention.total((*site, "variance"), stream, lambda own: (centred[:, own] ** 2).sum((1, 3)))
    normed = centred * torch.rsqrt(squares / numbers + norm.eps)[:, None, :, None]
    return (normed.flatten(2) * norm.weight + norm.bias).to(x.dtype)
