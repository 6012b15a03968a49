"""Which attention kernels are refused, and what each version of SageAttention is asked."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from paralleldit.parallel_backend.attention import kernels
from paralleldit.parallel_backend.attention.kernels import KERNELS, select_kernel
from paralleldit.parallel_backend.errors import UserError

CUDA = torch.device("cuda")


def first_version(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
    assert q.shape[-1] in kernels.SAGE_WIDTHS
    k -= k.mean(dim=2, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, scale=sm_scale)


def second_version(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return (out, lse) if return_lse else out


@pytest.fixture
def install(monkeypatch):
    """Puts a stand-in for the package where it is looked for."""

    def put(sageattn):
        module = ModuleType("sageattention")
        module.__spec__ = ModuleSpec("sageattention", None)
        module.sageattn = sageattn  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "sageattention", module)
        kernels._sage_lacks_lse.cache_clear()

    yield put
    kernels._sage_lacks_lse.cache_clear()


@pytest.mark.parametrize("width", [16, 64, 72, 88])
@pytest.mark.parametrize("version", [first_version, second_version])
def test_sage_gives_the_whole_output_and_leaves_the_keys_alone(install, version, width):
    install(version)
    q, k, v = (torch.randn(2, 3, length, width) for length in (5, 7, 7))
    keys = k.clone()
    out = KERNELS["sage"].attend(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, keys, v))
    assert torch.equal(k, keys)


def test_a_version_of_sage_without_log_sum_exp_is_refused_in_a_ring(install):
    install(first_version)
    assert select_kernel("sage", CUDA, torch.bfloat16) is KERNELS["sage"]
    with pytest.raises(UserError, match="version 1 of sageattention"):
        select_kernel("sage", CUDA, torch.bfloat16, with_lse=True)
    install(second_version)
    select_kernel("sage", CUDA, torch.bfloat16, with_lse=True)


@pytest.mark.parametrize(
    ("device", "dtype", "text"), [("cpu", torch.bfloat16, "on CUDA only"), ("cuda", torch.float32, "fp16 or bf16")]
)
def test_cudnn_is_refused_where_it_cannot_run(device, dtype, text):
    with pytest.raises(UserError, match=text):
        select_kernel("cudnn", torch.device(device), dtype)
