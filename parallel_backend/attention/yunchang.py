"""Attention by the library yunchang (USP, arXiv 2405.07719), selectable where it is right: on CUDA with flash-attn.

Its other kernels hand the ring a log-sum-exp of zero, which gives wrong numbers without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.axis import Axis
from ..distributed.groups import new_group
from ..errors import UserError
from ..tokens.plan import Tokens, lengths_by_tokens
from .site import KeysValues, Sent


class YunchangAttention:
    """As `AttentionCore`, for shares of equal length and heads that the Ulysses degree divides."""

    keeps = False

    def __init__(self, ulysses: Axis, ring: Axis, device: torch.device, dtype: torch.dtype) -> None:
        missing = [package for package in ("yunchang", "flash_attn") if find_spec(package) is None]
        half = dtype in (torch.float16, torch.bfloat16)
        if missing or device.type != "cuda" or not half:
            found = f"{', '.join(missing)} not installed" if missing else f"{dtype} on {device.type}"
            raise UserError(
                f"attention=yunchang needs CUDA, fp16 or bf16, yunchang and flash-attn; found: {found}.",
                "Choose attention=auto: our own core does the same with any kernel.",
            )
        from yunchang import LongContextAttention
        from yunchang.globals import PROCESS_GROUP
        from yunchang.kernels import AttnType

        # The library's own set-up assumes that the sequence-parallel ranks start at rank 0.
        vars(PROCESS_GROUP).update(ULYSSES_PG=_group(ulysses), RING_PG=_group(ring))
        self._attention = LongContextAttention(attn_type=AttnType.FA)
        self._ulysses_degree = ulysses.size
        self._lengths: dict[Tokens, list[int]] = {}

    def set_lengths(self, text: Sequence[int], image: Sequence[int]) -> None:
        self._lengths = lengths_by_tokens(text, image)

    def send(self, x: Tensor, tokens: Tokens = "all") -> Sent:
        """Nothing is sent yet: the library does all of it at once."""
        lengths = self._lengths[tokens]
        if len(set(lengths)) > 1:
            raise UserError(
                f"attention=yunchang needs the same number of tokens on every rank; here they hold {lengths}.",
                "Choose attention=auto, which takes uneven shares.",
            )
        return Sent(x, tokens)

    def __call__(self, q: Sent, k: Sent, v: Sent, beside: KeysValues | None = None) -> Tensor:
        """Attention of this rank's queries over all ranks' keys and values, `[B, S, H, D]`."""
        if beside is not None:
            raise UserError(
                "attention=yunchang takes no keys beside the tokens', as an IP-Adapter for this model has them.",
                "Choose attention=auto.",
            )
        if q.heads % self._ulysses_degree:
            raise UserError(
                f"attention=yunchang needs heads that ulysses_degree divides: {q.heads} by {self._ulysses_degree}.",
                "Choose attention=auto, which takes uneven heads.",
            )
        return self._attention(*(sent.wait().transpose(1, 2).contiguous() for sent in (q, k, v)))


def _group(axis: Axis) -> dist.ProcessGroup:
    # None would mean the whole world to the library.
    return axis.group or _group_of_one()


@cache
def _group_of_one() -> dist.ProcessGroup:
    return new_group([dist.get_rank()])
