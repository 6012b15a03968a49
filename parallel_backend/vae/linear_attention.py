"""The linear attention of SANA's autoencoder over all pixels of a picture that is cut into bands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
from torch import nn

from ..attention.linear import _attend
from ..distributed.axis import Axis

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
