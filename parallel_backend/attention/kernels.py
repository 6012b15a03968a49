"""Attention on one rank: a table of kernels, each with and without the log-sum-exp that a ring needs.

Tensors are `[B, H, S, D]`; queries and keys may differ in S. The log-sum-exp is fp32 `[B, H, S]`, natural logarithm.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..layout.layout import AttentionKernel

log = logging.getLogger(__name__)

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
    """The kernel called `name`; "auto" is `best_kernel`.

    `with_lse`: for a ring. Raises `UserError` when its package is not installed, or when it cannot run on `device`, in
    `dtype`, or in a ring.
    """
    if name == "auto":
        return best_kernel(device, dtype, with_lse)
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


@cache
def preferred_kernel(name: AttentionKernel, device: torch.device, dtype: torch.dtype, with_lse: bool) -> Kernel:
    """The kernel called `name` where it can run, as in `select_kernel`; else that of "auto", and the log says why."""
    try:
        return select_kernel(name, device, dtype, with_lse=with_lse)
    except UserError as error:
        log.warning("A node chose attention=%s, but: %s The ranks take attention=auto.", name, error.message)
        return select_kernel("auto", device, dtype, with_lse=with_lse)


FASTER_ON_HOPPER = ("flash3", "cudnn")
"""What is faster than SDPA on GPUs of the Hopper generation and newer, the fastest first."""
WIDTHS = (64, 72, 88, 128)
"""Widths of heads that kernels are tried with; wider ones are left to SDPA."""
ROUNDING = 0.02
"""The largest relative difference between two kernels in half precision."""


@cache
def best_kernel(device: torch.device, dtype: torch.dtype, with_lse: bool) -> Kernel:
    """The fastest kernel that is installed and agrees with SDPA on `device`; SDPA where there is none.

    Tried once for a device and dtype, and said in the log.
    """
    if _is_hopper(device) and dtype in (torch.float16, torch.bfloat16):
        for name in FASTER_ON_HOPPER:
            kernel = KERNELS[name]
            if (kernel.package and find_spec(kernel.package) is None) or not _agrees(name, device, dtype, with_lse):
                continue
            log.info("attention=auto computes with %s in %s", name, dtype)
            return Kernel(_up_to_widest(kernel, "attend"), _up_to_widest(kernel, "attend_with_lse"))
    log.info("attention=auto computes with sdpa in %s", dtype)
    return KERNELS["sdpa"]


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _agrees(name: str, device: torch.device, dtype: torch.dtype, with_lse: bool) -> bool:
    """Whether the kernel computes what SDPA does, in both layouts in which blocks and exchanges leave their tensors."""
    kernel, draw = KERNELS[name], torch.Generator(device).manual_seed(0)
    for width in WIDTHS:
        # [S, H, B, D] and [B, S, H, D], as [B, H, S, D].
        for sizes, order in (((77, 3, 2, width), (2, 1, 0, 3)), ((2, 77, 3, width), (0, 2, 1, 3))):
            q, k, v = (torch.randn(sizes, generator=draw, device=device).to(dtype).permute(order) for _ in range(3))
            expected = F.scaled_dot_product_attention(q, k, v)
            try:
                outputs = [kernel.attend_with_lse(q, k, v)[0]] if with_lse else []
                outputs.append(kernel.attend(q, k, v))
            except (ImportError, RuntimeError, TypeError, ValueError) as error:
                log.warning("attention=auto does without %s, which fails here: %s", name, error)
                return False
            if any(torch.dist(each.float(), expected.float()) > ROUNDING * expected.float().norm() for each in outputs):
                log.warning("attention=auto does without %s, which does not agree with sdpa here", name)
                return False
    return True


def _up_to_widest(kernel: Kernel, called: str) -> Callable[..., Any]:
    """What is `called` so of the kernel, for heads of widths that it was tried with and those between; SDPA's for
    others."""
    attend, others = getattr(kernel, called), getattr(KERNELS["sdpa"], called)
    return lambda q, k, v: (attend if q.shape[-1] <= WIDTHS[-1] and q.shape[-1] % 8 == 0 else others)(q, k, v)
