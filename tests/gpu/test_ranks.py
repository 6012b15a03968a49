"""Several ranks that share one GPU give what CPU ranks give, by every method and with every family.

Exact methods are compared with one CPU rank, approximate ones with as many CPU ranks. Sizes are uneven: 11 x 9 latent
cells, three heads.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.tests.gpu.shared_device import through_host_memory
from paralleldit.tests.ranks import stale_families, test_attention_ranks, test_vae_ranks
from paralleldit.tests.ranks.stale_families import HEADS, STEPS, relative_error
from paralleldit.tests.tiny_models import TINY_MODELS

pytestmark = pytest.mark.gpu

MODELS = ["flux dev", "sd3.5 medium", "pixart alpha", "hunyuandit 1.1"]
TOLERANCE = 1e-4
"""Relative, of a run in fp32: the CPU's and the GPU's kernels add up in other orders."""
LAYOUTS = [
    Layout(ulysses_degree=2),
    Layout(ring_degree=2),
    Layout(tensor_degree=2),
    Layout(cfg_degree=2),
    Layout(data_degree=2),
    Layout(ulysses_degree=2, weights="sharded"),
    Layout(ring_degree=2, weights="offloaded"),
    Layout(pipefusion_degree=2, num_patches=3, warmup_steps=STEPS),
    Layout(pipefusion_degree=2, num_patches=3),
    Layout(pipefusion_degree=2, num_patches=2, warmup_steps=0),
    Layout(pipefusion_degree=2, num_patches=2, weights="offloaded"),
    Layout(distrifusion_degree=2),
    Layout(distrifusion_degree=2, refresh="in_turn"),
    Layout(ulysses_degree=2, ring_degree=2),
    Layout(ulysses_degree=4),
    Layout(tensor_degree=2, ulysses_degree=2, weights="sharded"),
    Layout(tensor_degree=2, pipefusion_degree=2, num_patches=3),
    Layout(ulysses_degree=2, pipefusion_degree=2, num_patches=3),
    Layout(ring_degree=2, pipefusion_degree=2, num_patches=2),
    Layout(pipefusion_degree=4, num_patches=5),
    Layout(pipefusion_degree=2, cfg_degree=2, num_patches=2),
    Layout(distrifusion_degree=2, ulysses_degree=2),
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for model in MODELS:
        TINY_MODELS[model].make(HEADS).save_pretrained(folder / model)
    return {model: folder / model for model in MODELS}


def sampled(world, layout, paths, device):
    return {model: stale_families.sampled(world, model, layout, path, device) for model, path in paths.items()}


def sampled_on_shared(world, layout, paths, device):
    with through_host_memory():
        return sampled(world, layout, paths, device)


@pytest.mark.parametrize("layout", sorted(LAYOUTS, key=lambda layout: layout.ranks), ids=str)
def test_a_run_equals_that_of_cpu_ranks(ranks, device, paths, layout):
    is_exact = layout.is_exact or layout.warmup_steps >= STEPS
    (expected, *_) = (
        ranks.once(1, sampled, Layout(), paths, "cpu")
        if is_exact
        else ranks.run(layout.ranks, sampled, layout, paths, "cpu")
    )
    errors = {
        (rank, model): relative_error(latent, expected[model])
        for rank, answer in enumerate(ranks.run(layout.ranks, sampled_on_shared, layout, paths, device))
        for model, latent in answer.items()
    }
    assert max(errors.values()) <= TOLERANCE, errors


def attended(world, device, dtype, cases):
    with through_host_memory():
        return [test_attention_ranks.attend(world, *case, dtype, device).cpu() for case in cases]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [2, 4])
def test_shares_of_attention_equal_the_whole(ranks, device, n, dtype):
    cases = [case for case in test_attention_ranks.CASES if case[0] * case[1] == n]
    shares = ranks.run(n, attended, device, dtype, cases)
    for case, parts in zip(cases, zip(*shares, strict=True), strict=True):
        error = test_attention_ranks.error_of(parts, *case[2:], dtype)
        assert error <= (1e-5 if dtype == torch.float32 else 1e-2), case


def decoded_on_shared(world, case, device):
    torch.backends.cudnn.allow_tf32 = False
    with through_host_memory():
        return test_vae_ranks.results(world, case, device)


@pytest.mark.parametrize(
    ("n", "case"), [*product((2, 4), ("AutoencoderKL (Flux)", "AutoencoderDC (SANA)", "AutoencoderKLWan (2.1)"))]
)
def test_a_vae_equals_that_of_one_cpu_rank(ranks, device, n, case):
    (expected,) = ranks.once(1, test_vae_ranks.results, case)
    first, *_ = ranks.run(n, decoded_on_shared, case, device)
    for found, wanted in zip(first, expected, strict=True):
        for mine, truth in zip(found, wanted, strict=True):
            assert relative_error(mine, truth) <= TOLERANCE
