"""Attention on one rank: a table of kernels, each with and without the log-sum-exp that a ring needs.

Tensors are `[B, H, S, D]`; queries and keys may differ in S. The log-sum-exp is fp32 `[B, H, S]`, natural logarithm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..layout import AttentionKernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
AttendWithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Kernel:
    attend: Attend
    attend_with_lse: AttendWithLse
    package: str | None = None
    half_only: bool = False


def _sdpa_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    ops = torch.ops.aten
    if q.device.type == "cpu":
        return ops._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if q.dtype in (torch.float16, torch.bfloat16):
        return ops._scaled_dot_product_flash_attention(q, k, v)[:2]
    out, lse, *_ = ops._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out, lse[..., : q.shape[2]]  # the kernel pads the log-sum-exp to a multiple of 32 rows


def _flash2_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    out, lse, _ = flash_attn_func(*_heads_last(q, k, v), return_attn_probs=True)
    return out.transpose(1, 2), lse


def _flash3_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import flash_attn_func  # pyright: ignore[reportMissingImports]

    out, lse = flash_attn_func(*_heads_last(q, k, v), return_attn_probs=True)
    return out.transpose(1, 2), lse


def _sage_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from sageattention import sageattn  # pyright: ignore[reportMissingImports]

    return sageattn(q, k, v, tensor_layout="HND", return_lse=True)


def _heads_last(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _without_lse(attend_with_lse: AttendWithLse) -> Attend:
    return lambda q, k, v: attend_with_lse(q, k, v)[0]


KERNELS: dict[str, Kernel] = {
    "sdpa": Kernel(F.scaled_dot_product_attention, _sdpa_with_lse),
    "flash2": Kernel(_without_lse(_flash2_with_lse), _flash2_with_lse, package="flash_attn", half_only=True),
    "flash3": Kernel(_without_lse(_flash3_with_lse), _flash3_with_lse, package="flash_attn_interface", half_only=True),
    "sage": Kernel(_without_lse(_sage_with_lse), _sage_with_lse, package="sageattention", half_only=True),
}


def select_kernel(name: AttentionKernel, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel called `name`; "auto" is PyTorch's own choice (SDPA), which is exact on every device and dtype.

    Raises `UserError` when its package is not installed, or when it cannot run on `device` or in `dtype`.
    """
    if name == "auto":
        return KERNELS["sdpa"]
    kernel = KERNELS[name]
    others = "Choose attention=auto or sdpa."
    if kernel.package and find_spec(kernel.package) is None:
        raise UserError(
            f"attention={name} needs the package {kernel.package}, which is not installed in the ranks' Python.", others
        )
    if kernel.package and device.type != "cuda":
        raise UserError(f"attention={name} runs on CUDA only, and the ranks compute on {device.type}.", others)
    if kernel.half_only and dtype not in (torch.float16, torch.bfloat16):
        raise UserError(f"attention={name} computes in fp16 or bf16, and the model computes in {dtype}.", others)
    return kernel
