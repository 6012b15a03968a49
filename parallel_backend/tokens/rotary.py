"""Rotary position embedding (RoFormer, arXiv 2104.09864) of interleaved pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def rotations(cosines: Tensor, sines: Tensor) -> Tensor:
    """Cosine and sine of every angle, fp32 `[S, D / 2, 2]`, from tables `[S, D]` in which each stands twice."""
    return torch.stack((cosines[:, ::2], sines[:, ::2]), dim=-1).float()


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs of `x` `[B, S, H, D]` by `rotation` `[S, D / 2, 2]`, in fp32."""
    pairs, rotation = x.float().unflatten(-1, (x.shape[-1] // 2, 2)), rotation.unsqueeze(1)
    if torch.compiler.is_compiling():
        # The compiler makes one kernel of this, and none of complex numbers.
        (real, imaginary), (cosine, sine) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2).to(x.dtype)
