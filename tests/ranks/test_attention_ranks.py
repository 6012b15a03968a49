"""Sequence-parallel attention equals attention in one process, whatever the shares of tokens and heads."""

import pytest
import torch
import torch.nn.functional as F
from paralleldit.parallel_backend.attention.kernels import KERNELS
from paralleldit.parallel_backend.attention.site import KeySet
from paralleldit.parallel_backend.attention.usp import AttentionCore
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.layout.split import split_sizes

CASES = [
    # ulysses, ring, tokens, heads, batch
    (1, 1, 12, 4, 1),
    (2, 1, 12, 4, 2),
    (4, 1, 13, 4, 1),
    (4, 1, 13, 6, 2),
    (8, 1, 21, 6, 1),
    (8, 1, 5, 3, 1),
    (1, 2, 12, 4, 2),
    (1, 3, 13, 5, 1),
    (1, 8, 21, 3, 2),
    (1, 8, 5, 3, 1),
    (2, 2, 15, 3, 2),
    (2, 4, 29, 5, 1),
    (4, 2, 30, 6, 2),
    (3, 2, 4, 4, 1),
]


def attend(world, ulysses, ring, tokens, heads, batch, dtype, device="cpu"):
    mesh = Mesh(Layout(ulysses_degree=ulysses, ring_degree=ring))
    core = AttentionCore(mesh.ulysses, mesh.ring, KERNELS["sdpa"])
    lengths = split_sizes(tokens, ulysses * ring)
    core.set_lengths({"image": lengths})
    start = sum(lengths[: mesh.sequence.rank])
    shares = [part[:, start : start + lengths[mesh.sequence.rank]] for part in inputs(tokens, heads, batch, dtype)]
    shares = [share.to(device) for share in shares]
    value, key, query = (core.send(share, ("image",)) for share in reversed(shares))
    return core((0, "all"), query, KeySet(key, value))


def inputs(tokens, heads, batch, dtype):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(batch, tokens, heads, 16, generator=generator).to(dtype) for _ in range(3)]


def error_of(shares, tokens, heads, batch, dtype):
    """Of what all ranks give together, relative to attention in one process and in fp32."""
    q, k, v = (part.transpose(1, 2) for part in inputs(tokens, heads, batch, dtype))
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).transpose(1, 2)
    return (torch.cat(shares, dim=1).float() - expected).norm() / expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("ulysses", "ring", "tokens", "heads", "batch"), CASES)
def test_shares_of_attention_equal_the_whole(ranks, ulysses, ring, tokens, heads, batch, dtype):
    shares = ranks.run(ulysses * ring, attend, ulysses, ring, tokens, heads, batch, dtype)
    error = error_of(shares, tokens, heads, batch, dtype)
    assert error <= (1e-5 if dtype == torch.float32 else 1e-2)
