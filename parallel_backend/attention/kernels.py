"""Attention on one rank: a table of kernels, each with and without the log-sum-exp that a ring needs.

Tensors are `[B, H, S, D]`; queries and keys may differ in S. The log-sum-exp is fp32 `[B, H, S]`, natural logarithm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..layout.layout import AttentionKernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
AttendWithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Kernel:
    """`package`: what must be installed. `lacks_lse`: why what is installed gives no log-sum-exp, if so."""

    attend: Attend
    attend_with_lse: AttendWithLse
    package: str | None = None
    half_only: bool = False
    cuda_only: bool = False
    lacks_lse: Callable[[], str] = lambda: ""


def _sdpa_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    ops = torch.ops.aten
    if q.device.type == "cpu":
        return ops._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if q.dtype in (torch.float16, torch.bfloat16):
        return ops._scaled_dot_product_flash_attention(q, k, v)[:2]
    out, lse, *_ = ops._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out, lse[..., : q.shape[2]]  # the kernel pads the log-sum-exp to a multiple of 32 rows


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]


def _cudnn_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, lse.reshape(q.shape[:3])  # with a last dim of one


def _flash2_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    out, lse, _ = flash_attn_func(*_heads_last(q, k, v), return_attn_probs=True)
    return out.transpose(1, 2), lse


def _flash3_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import flash_attn_func  # pyright: ignore[reportMissingImports]

    out, lse = flash_attn_func(*_heads_last(q, k, v), return_attn_probs=True)
    return out.transpose(1, 2), lse


SAGE_WIDTHS = (64, 96, 128)
"""Widths of heads that version 1 of SageAttention has kernels for. Later ones fill others up themselves."""


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn  # pyright: ignore[reportMissingImports]

    if not _sage_lacks_lse():
        return sageattn(q, k, v, tensor_layout="HND")
    dim = q.shape[-1]
    more = next((width - dim for width in SAGE_WIDTHS if width >= dim), 0)
    # Version 1 takes the mean off the keys in their place: these may be kept for the next step.
    q, k, v = (F.pad(each, (0, more)) for each in (q, k, v)) if more else (q, k.clone(), v)
    return sageattn(q, k, v, tensor_layout="HND", sm_scale=dim**-0.5)[..., :dim]


def _sage_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from sageattention import sageattn  # pyright: ignore[reportMissingImports]

    return sageattn(q, k, v, tensor_layout="HND", return_lse=True)


@cache
def _sage_lacks_lse() -> str:
    from sageattention import sageattn  # pyright: ignore[reportMissingImports]

    # Version 1 takes any keyword, and returns the output alone.
    return "" if "return_lse" in signature(sageattn).parameters else "version 1 of sageattention gives none"


def _heads_last(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _without_lse(attend_with_lse: AttendWithLse) -> Attend:
    return lambda q, k, v: attend_with_lse(q, k, v)[0]


KERNELS: dict[str, Kernel] = {
    "sdpa": Kernel(F.scaled_dot_product_attention, _sdpa_with_lse),
    "cudnn": Kernel(_cudnn, _cudnn_with_lse, half_only=True, cuda_only=True),
    "flash2": Kernel(
        _without_lse(_flash2_with_lse), _flash2_with_lse, package="flash_attn", half_only=True, cuda_only=True
    ),
    "flash3": Kernel(
        _without_lse(_flash3_with_lse), _flash3_with_lse, package="flash_attn_interface", half_only=True, cuda_only=True
    ),
    "sage": Kernel(
        _sage,
        _sage_with_lse,
        package="sageattention",
        half_only=True,
        cuda_only=True,
        lacks_lse=_sage_lacks_lse,
    ),
}


def select_kernel(name: AttentionKernel, device: torch.device, dtype: torch.dtype, *, with_lse: bool = False) -> Kernel:
    """The kernel called `name`; "auto" is PyTorch's own choice (SDPA), which is exact on every device and dtype.

    `with_lse`: for a ring. Raises `UserError` when its package is not installed, or when it cannot run on `device`, in
    `dtype`, or in a ring.
    """
    if name == "auto":
        return KERNELS["sdpa"]
    kernel = KERNELS[name]
    others = "Choose attention=auto or sdpa."
    if kernel.package and find_spec(kernel.package) is None:
        raise UserError(
            f"attention={name} needs the package {kernel.package}, which is not installed in the ranks' Python.", others
        )
    if kernel.cuda_only and device.type != "cuda":
        raise UserError(f"attention={name} runs on CUDA only, and the ranks compute on {device.type}.", others)
    if kernel.half_only and dtype not in (torch.float16, torch.bfloat16):
        raise UserError(f"attention={name} computes in fp16 or bf16, and the model computes in {dtype}.", others)
    if with_lse and (why := kernel.lacks_lse()):
        raise UserError(f"attention={name} cannot work in a ring, which needs a log-sum-exp: {why}.", others)
    return kernel
