"""The linear attention of SANA's autoencoder over all pixels of a picture that is cut into bands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
from torch import Tensor, nn

from ..comm import Axis

FORMS = ("apply_linear_attention", "apply_quadratic_attention")
"""Two orders of the same products. The class chooses by the number of pixels, here by that of a band."""


@contextmanager
def summed_linear_attention(module: nn.Module, axis: Axis) -> Iterator[None]:
    """While it is entered, the attention in `module` sums keys and values over the bands of all ranks of `axis`."""
    parts = [part for part in module.modules() if isinstance(part, SanaMultiscaleLinearAttention)]
    for part in parts:
        for form in FORMS:
            setattr(part, form, partial(_attend, axis, part.eps))
    try:
        yield
    finally:
        for part in parts:
            for form in FORMS:
                delattr(part, form)


def _attend(axis: Axis, eps: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each `[B, G, D, pixels]`; computed in fp32 (arXiv 2205.14756, section 3.1)."""
    dtype = value.dtype
    query, key, value = (each.float() for each in (query, key, value))
    with_count = torch.cat([value, torch.ones_like(value[:, :, :1])], dim=2)
    sums = axis.all_reduce(torch.matmul(with_count, key.transpose(-1, -2)).contiguous())
    attended = torch.matmul(sums, query)
    return (attended[:, :, :-1] / (attended[:, :, -1:] + eps)).to(dtype)
