"""Attention by the library yunchang (USP, arXiv 2405.07719), selectable where it is right: on CUDA with flash-attn.

Its other kernels hand the ring a log-sum-exp of zero, which gives wrong numbers without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.axis import Axis
from ..distributed.groups import new_group
from ..errors import UserError
from .halo import edges_of, gathered, with_halo
from .site import KeySet, KeysValues, Sent, SiteId, Streams, Sum


class YunchangAttention:
    """Implements `AttentionCore` for shares of equal length and heads that the Ulysses degree divides."""

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
        self._ulysses, self._ring = ulysses, ring
        self._lengths: Mapping[str, Sequence[int]] = {}

    def set_lengths(self, lengths: Mapping[str, Sequence[int]]) -> None:
        self._lengths = lengths

    def send(self, x: Tensor, streams: Streams, serves: Sequence[int] | None = None) -> Sent:
        """Nothing is sent yet: the library does all of it at once."""
        lengths = [sum(each) for each in zip(*(self._lengths[name] for name in streams), strict=True)]
        if len(set(lengths)) > 1:
            raise UserError(
                f"attention=yunchang needs the same number of tokens on every rank; here they hold {lengths}.",
                "Choose attention=auto, which takes uneven shares.",
            )
        if serves is not None:
            raise UserError(
                "attention=yunchang needs a key head for each query head; this model has fewer.",
                "Choose attention=auto.",
            )
        return Sent(x, streams)

    def __call__(self, site: SiteId, q: Sent, *sets: KeySet, extra_kv: KeysValues | None = None) -> Tensor:
        """Attention of this rank's queries over all ranks' keys and values, `[B, S, H, D]`."""
        keys, *others = sets
        if extra_kv is not None or others or keys.log_weight or keys.places is not None:
            raise UserError(
                "attention=yunchang attends to one set of keys, all of them alike; this model, or an IP-Adapter for "
                "it, has more.",
                "Choose attention=auto.",
            )
        if q.heads % self._ulysses.size:
            raise UserError(
                f"attention=yunchang needs heads that ulysses_degree divides: {q.heads} by {self._ulysses.size}.",
                "Choose attention=auto, which takes uneven heads.",
            )
        return self._attention(*(sent.wait().transpose(1, 2).contiguous() for sent in (q, keys.key, keys.value)))

    def local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

        return flash_attn_func(q, k, v)

    def total(self, site: SiteId, stream: str, of: Sum) -> Tensor:
        return self._ring.all_reduce(self._ulysses.all_reduce(of(slice(None)).contiguous()))

    def halo(self, site: SiteId, stream: str, x: Tensor, row: int) -> list[Tensor]:
        edges = gathered(edges_of([x], row), (self._ulysses, self._ring))[:, 0]
        rank = self._ring.rank * self._ulysses.size + self._ulysses.rank
        return [with_halo(x, rank, edges, self._lengths[stream])]


def _group(axis: Axis) -> dist.ProcessGroup:
    # None would mean the whole world to the library.
    return axis.group or _group_of_one()


@cache
def _group_of_one() -> dist.ProcessGroup:
    return new_group([dist.get_rank()])
