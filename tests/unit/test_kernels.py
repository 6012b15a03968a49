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

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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


@pytest.fixture
def hopper(monkeypatch):
    """Pretends that the CPU is a Hopper GPU, with a cuDNN that computes as `attend` does."""

    def put(attend):
        with_lse = lambda q, k, v: (attend(q, k, v), torch.zeros(q.shape[:3]))  # noqa: E731
        monkeypatch.setitem(KERNELS, "cudnn", kernels.Kernel(attend, with_lse))
        monkeypatch.setattr(kernels, "_is_hopper", lambda device: True)
        kernels.best_kernel.cache_clear()

    yield put
    kernels.best_kernel.cache_clear()


def fails(q, k, v):
    raise RuntimeError("no engine")


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize(
    ("attend", "dtype", "chosen"),
    [
        (F.scaled_dot_product_attention, torch.bfloat16, "cudnn"),
        (F.scaled_dot_product_attention, torch.float32, "sdpa"),
        (lambda q, k, v: v * 2, torch.bfloat16, "sdpa"),
        (fails, torch.bfloat16, "sdpa"),
    ],
    ids=["agrees", "fp32", "computes something else", "fails"],
)
def test_auto_is_the_fastest_kernel_that_agrees(hopper, caplog, attend, dtype, chosen, with_lse):
    calls = []
    hopper(lambda q, k, v: calls.append(q.shape[-1]) or attend(q, k, v))
    with caplog.at_level("INFO"):
        kernel = select_kernel("auto", CPU, dtype, with_lse=with_lse)
        select_kernel("auto", CPU, dtype, with_lse=with_lse)
    assert f"computes with {chosen}" in caplog.text
    assert caplog.text.count("computes with") == 1
    calls.clear()
    for width in (64, 100, 256):
        kernel.attend(*torch.zeros(3, 1, 1, 4, width, dtype=dtype))
    assert calls == ([64] if chosen == "cudnn" else [])


def test_auto_is_sdpa_where_there_is_no_gpu():
    assert select_kernel("auto", CPU, torch.bfloat16) is KERNELS["sdpa"]


@pytest.mark.parametrize(
    ("device", "dtype", "ring", "chosen"),
    [(CUDA, torch.bfloat16, False, "sage"), (CUDA, torch.bfloat16, True, "sdpa"), (CPU, torch.bfloat16, False, "sdpa")],
    ids=["works", "does not in a ring", "does not on the CPU"],
)
def test_a_kernel_that_a_node_prefers_is_taken_where_it_works(
    install, caplog, monkeypatch, device, dtype, ring, chosen
):
    install(first_version)
    monkeypatch.setattr(kernels, "_is_hopper", lambda device: False)
    kernels.preferred_kernel.cache_clear()
    assert kernels.preferred_kernel("sage", device, dtype, ring) is KERNELS[chosen]
    assert ("A node chose attention=sage, but" in caplog.text) == (chosen == "sdpa")
    kernels.preferred_kernel.cache_clear()
    kernels.best_kernel.cache_clear()
