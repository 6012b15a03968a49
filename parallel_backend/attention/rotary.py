"""Rotary position embedding (RoFormer, arXiv 2104.09864) of interleaved pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def rotations(cosines: Tensor, sines: Tensor) -> Tensor:
    """Unit complex numbers `[S, D / 2]` from tables `[S, D]` in which every angle stands twice."""
    return torch.complex(cosines[:, ::2].float(), sines[:, ::2].float())


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs of `x` `[B, S, H, D]` by `rotation` `[S, D / 2]`, in fp32, as one complex multiplication."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (x.shape[-1] // 2, 2)))
    return torch.view_as_real(pairs * rotation.unsqueeze(1)).flatten(-2).to(x.dtype)
