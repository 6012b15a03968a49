"""The ledger counts what the theory of each method says that a rank sends in one step."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from paralleldit.parallel_backend.attention.core import AttentionCore
from paralleldit.parallel_backend.attention.kernels import KERNELS
from paralleldit.parallel_backend.families.base import Condition
from paralleldit.parallel_backend.families.flux import Flux
from paralleldit.parallel_backend.layout import Layout
from paralleldit.parallel_backend.mesh import Mesh
from paralleldit.parallel_backend.sampling.model_sampling import DiscreteFlow
from paralleldit.parallel_backend.strategies.guidance import Guidance
from paralleldit.parallel_backend.strategies.sequence import SequenceParallel

HEADS, HEAD_DIM, LAYERS, BYTES = 8, 16, 5, 4
TEXT, ROWS, BATCH = 16, 16, 2
TOKENS = TEXT + (ROWS // 2) ** 2
LATENT_BYTES = BATCH * 16 * ROWS * ROWS * BYTES


def traffic_of_one_step(world, layout: Layout) -> dict[str, int]:
    torch.manual_seed(1)
    transformer = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=LAYERS - 2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    family = Flux(transformer, torch.float32, torch.device("cpu"))
    mesh = Mesh(layout)
    attention = AttentionCore(mesh.ulysses, mesh.ring, KERNELS["sdpa"])
    predict = SequenceParallel(family, mesh.sequence, attention).predict
    condition = Condition(torch.randn(1, TEXT, 24), torch.randn(1, 12))
    guidance = Guidance(predict, DiscreteFlow(1.0, 1.0), mesh.cfg, condition, condition, 2.0)
    guidance.denoised(torch.randn(BATCH, 16, ROWS, ROWS), torch.tensor(0.5))
    return {axis: mesh.ledger.bytes_on(axis) for axis in ("ulysses", "ring", "sequence", "cfg")}


@pytest.mark.parametrize(("ulysses", "ring", "cfg"), [(2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 1), (2, 2, 2)])
def test_bytes_sent_match_theory(ranks, ulysses, ring, cfg):
    layout = Layout(ulysses_degree=ulysses, ring_degree=ring, cfg_degree=cfg)
    evaluations = 2 // cfg
    token_bytes = BATCH * HEADS * HEAD_DIM * BYTES * LAYERS * evaluations
    sequence = ulysses * ring
    expected = {
        # USP (arXiv 2405.07719): four all-to-alls of this rank's tokens; keys and values of R - 1 other ranks' hops.
        "ulysses": 4 * (ulysses - 1) / ulysses**2 * TOKENS / ring * token_bytes,
        "ring": 2 * (ring - 1) * TOKENS / ring / ulysses * token_bytes,
        # The predicted latent is put together once an evaluation, and handed over once a step.
        "sequence": (sequence - 1) / sequence * LATENT_BYTES * evaluations,
        "cfg": (cfg - 1) * LATENT_BYTES,
    }
    for sent in ranks.run(layout.ranks, traffic_of_one_step, layout):
        assert sent == pytest.approx(expected, rel=0.05)
