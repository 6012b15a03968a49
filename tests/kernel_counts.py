"""Counts what a call would launch on a GPU, without one: kernels, the bytes they move, collectives.

Every operation that is no view is a kernel. Attention and RMS norm are one each, as on a GPU, whoever calls them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from paralleldit.parallel_backend.attention.kernels import Kernel
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_NO_KERNEL = """
    view _unsafe_view reshape _reshape_alias t transpose permute expand unsqueeze squeeze slice select split
    split_with_sizes chunk unbind narrow detach alias as_strided view_as_complex view_as_real unflatten flatten movedim
    unfold lift_fresh diagonal real imag empty empty_like new_empty empty_strided new_empty_strided is_same_size
    _local_scalar_dense
"""
NO_KERNEL = frozenset(_NO_KERNEL.split())
"""Views, and what is only allocated or read."""
COMPUTE_BOUND = frozenset(
    ["mm", "addmm", "addmm_", "bmm", "baddbmm", "convolution", "linear", "_scaled_mm", "attend", "attend_with_lse"]
)
"""Kernels whose time is not that of moving their bytes."""


@dataclass(frozen=True)
class Cost:
    """`bytes`: in and out of the kernels that are bound by memory."""

    kernels: int = 0
    bytes: int = 0
    collectives: int = 0
    operations: Counter[str] = field(default_factory=Counter, compare=False)

    def __sub__(self, other: Cost) -> Cost:
        operations = Counter(self.operations)
        operations.subtract(other.operations)
        return Cost(
            self.kernels - other.kernels,
            self.bytes - other.bytes,
            self.collectives - other.collectives,
            Counter({name: count for name, count in operations.items() if count}),
        )


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional"):
            # A hop of a ring is one launch, in which it sends and receives.
            self.collectives[name] += name not in ("wait_tensor", "send")
        elif name not in NO_KERNEL:
            self.kernels[name] += 1
            if name not in COMPUTE_BOUND:
                # What is only written to is not read.
                given = args[1:] if name in ("copy_", "fill_") else (args, kwargs)
                self.bytes += sum(map(_bytes, tree_flatten((given, out))[0]))
        return out


def _bytes(x: object) -> int:
    """What a kernel touches of a tensor: expanded dims once."""
    if not isinstance(x, Tensor) or not x.numel():
        return 0
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.element_size()


def cost_of(call: Callable[[], object]) -> Cost:
    """What a second call costs: the first one makes what is kept."""
    with torch.no_grad(), _one_kernel_each():
        call()
        with _Counting() as counting:
            call()
    return Cost(
        counting.kernels.total(),
        counting.bytes,
        counting.collectives.total(),
        counting.kernels + counting.collectives,
    )


_LIBRARY = torch.library.Library("paralleldit_counts", "DEF")
_LIBRARY.define("attend(Tensor q, Tensor k, Tensor v) -> Tensor")
_LIBRARY.define("attend_with_lse(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
_LIBRARY.define("rms_norm(Tensor x, Tensor? weight) -> Tensor")


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As GPU kernels lay out their output: heads last but one in memory."""
    batch, heads, length, dim = q.shape
    return q.new_zeros(batch, length, heads, dim).transpose(1, 2)


def _attend_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _attend(q, k, v), q.new_zeros(q.shape[:3], dtype=torch.float32)


for _key in ("CPU", "Meta"):
    _LIBRARY.impl("attend", _attend, _key)
    _LIBRARY.impl("attend_with_lse", _attend_with_lse, _key)
    _LIBRARY.impl("rms_norm", lambda x, weight=None: torch.empty_like(x), _key)

KERNEL = Kernel(torch.ops.paralleldit_counts.attend, torch.ops.paralleldit_counts.attend_with_lse)


@contextmanager
def _one_kernel_each() -> Iterator[None]:
    def attention(query, key, value, *args, **kwargs):
        return torch.ops.paralleldit_counts.attend(query, key, value)

    def rms_norm(x, shape, weight=None, eps=None):
        return torch.ops.paralleldit_counts.rms_norm(x, weight)

    with mock.patch.object(F, "scaled_dot_product_attention", attention), mock.patch.object(F, "rms_norm", rms_norm):
        yield


@contextmanager
def pretended_ranks(count: int) -> Iterator[None]:
    """This process is rank 0 of so many; what the others send is not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
