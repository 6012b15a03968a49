"""Every attention kernel that is installed agrees with SDPA in fp32, and its log-sum-exp is that of the scores."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from paralleldit.parallel_backend.attention.kernels import KERNELS, select_kernel

pytestmark = pytest.mark.gpu

TOLERANCE = {"sdpa": 4e-3, "cudnn": 4e-3, "flash2": 4e-3, "flash3": 4e-3, "sage": 5e-2}
"""Relative: bf16 rounding, and for Sage that of 8-bit queries and keys."""
WIDTHS = [64, 72, 88, 128]
"""Of attention heads: Stable Diffusion 3's, PixArt's, HunyuanDiT's and Flux.1's."""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_equals_sdpa_in_fp32(device, name, dtype, width):
    kernel, device = KERNELS[name], torch.device(device)
    if kernel.cuda_only and device.type != "cuda":
        pytest.skip(f"{name} needs a CUDA device")
    if kernel.package and find_spec(kernel.package) is None:
        pytest.skip(f"{kernel.package} is not installed")
    if kernel.half_only and dtype == torch.float32:
        pytest.skip(f"{name} has no fp32")
    # As the core has them: tokens before heads.
    q, k, v = (
        torch.randn(2, length, 4, width, device=device, dtype=dtype).transpose(1, 2) for length in (70, 130, 130)
    )
    keys = k.clone()
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    results = [select_kernel(name, device, dtype).attend(q, k, v)]
    if not kernel.lacks_lse():
        out, lse = select_kernel(name, device, dtype, with_lse=True).attend_with_lse(q, k, v)
        results.append(out)
        scores = q.float() @ k.float().transpose(-1, -2) / width**0.5
        torch.testing.assert_close(lse.float(), scores.logsumexp(-1), atol=5e-2, rtol=0)
    for result in results:
        assert result.shape == expected.shape
        assert (result.float() - expected).norm() / expected.norm() <= TOLERANCE[name]
    assert torch.equal(k, keys), "keys may be kept for the next step"
