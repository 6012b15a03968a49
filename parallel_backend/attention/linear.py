"""Linear attention: sums over ranks instead of gathers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed.axis import Axis


def attend(axis: Axis, eps: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each `[B, G, D, pixels]`; computed in fp32 (arXiv 2205.14756, section 3.1)."""
    dtype = value.dtype
    query, key, value = (each.float() for each in (query, key, value))
    with_count = torch.cat([value, torch.ones_like(value[:, :, :1])], dim=2)
    sums = axis.all_reduce(torch.matmul(with_count, key.transpose(-1, -2)).contiguous())
    attended = torch.matmul(sums, query)
    return (attended[:, :, :-1] / (attended[:, :, -1:] + eps)).to(dtype)
