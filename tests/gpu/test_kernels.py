"""Every attention kernel that is installed agrees with SDPA in fp32, and its log-sum-exp is that of the scores."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from paralleldit.parallel_backend.attention.kernels import KERNELS, select_kernel

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
TOLERANCE = {"sdpa": 4e-3, "flash2": 4e-3, "flash3": 4e-3, "sage": 5e-2}
"""Relative: bf16 rounding, and for Sage that of 8-bit queries and keys."""


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_equals_sdpa_in_fp32(name, dtype):
    kernel = KERNELS[name]
    if kernel.package and find_spec(kernel.package) is None:
        pytest.skip(f"{kernel.package} is not installed")
    if kernel.half_only and dtype == torch.float32:
        pytest.skip(f"{name} has no fp32")
    q, k, v = (torch.randn(2, 4, length, 64, device=CUDA, dtype=dtype) for length in (70, 130, 130))
    scores = q.float() @ k.float().transpose(-1, -2) / 8
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    out, lse = select_kernel(name, CUDA, dtype).attend_with_lse(q, k, v)
    for result in (out, select_kernel(name, CUDA, dtype).attend(q, k, v)):
        assert (result.float() - expected).norm() / expected.norm() <= TOLERANCE[name]
    torch.testing.assert_close(lse.float(), scores.logsumexp(-1), atol=5e-2, rtol=0)
