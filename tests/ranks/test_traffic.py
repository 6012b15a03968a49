"""The ledger counts what the theory of each method says that a rank sends in one step."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from paralleldit.parallel_backend.attention.core import AttentionCore
from paralleldit.parallel_backend.attention.kernels import KERNELS
from paralleldit.parallel_backend.families.base import Condition
from paralleldit.parallel_backend.layout import Layout
from paralleldit.parallel_backend.mesh import Mesh
from paralleldit.parallel_backend.parts import Part
from paralleldit.parallel_backend.sample_request import strategy_of
from paralleldit.parallel_backend.sampling.model_sampling import DiscreteFlow
from paralleldit.parallel_backend.strategies.guidance import Guidance
from paralleldit.parallel_backend.transformer import Transformer

HEADS, HEAD_DIM, LAYERS, DOUBLE, BYTES = 8, 16, 5, 2, 4
TEXT, ROWS, BATCH = 16, 16, 2
IMAGE = (ROWS // 2) ** 2
TOKENS = TEXT + IMAGE
AXES = ("tensor", "ulysses", "ring", "distrifusion", "replicas", "sequence", "cfg")
LATENT_BYTES = BATCH * 16 * ROWS * ROWS * BYTES


COMMON = {
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
}


@dataclass(frozen=True)
class Theory:
    """A model and what passes through all its blocks in one evaluation.

    `attended` tokens, through the attention sites; `reduced` tokens, where tensor-parallel ranks add up their outputs;
    `gathered` vectors of modulation.
    """

    build: Callable[[], Any]
    attended: int
    reduced: int
    gathered: int


MODELS = {
    "flux": Theory(
        lambda: FluxTransformer2DModel(
            num_layers=DOUBLE, num_single_layers=LAYERS - DOUBLE, axes_dims_rope=(4, 6, 6), **COMMON
        ),
        attended=LAYERS * TOKENS,
        # After the attention and after the feed-forward; single blocks have both in one matrix.
        reduced=(LAYERS + DOUBLE) * TOKENS,
        gathered=12 * DOUBLE + 3 * (LAYERS - DOUBLE),
    ),
    "sd3.5 medium": Theory(
        lambda: SD3Transformer2DModel(
            num_layers=LAYERS,
            caption_projection_dim=HEADS * HEAD_DIM,
            pos_embed_max_size=ROWS,
            dual_attention_layers=tuple(range(DOUBLE)),
            qk_norm="rms_norm",
            **COMMON,
        ),
        attended=LAYERS * TOKENS + DOUBLE * IMAGE,
        # The last block gives no text, and modulates it with two vectors instead of six.
        reduced=2 * (LAYERS * TOKENS - TEXT) + DOUBLE * IMAGE,
        gathered=12 * LAYERS - 4 + 3 * DOUBLE,
    ),
}


def traffic_of_one_step(world, layout: Layout, path: Path) -> dict[str, int]:
    mesh = Mesh(layout)
    family = Transformer(path, torch.device("cpu"), part=Part.of(layout, mesh)).on(mesh)
    attention = AttentionCore(mesh.ulysses, mesh.ring, KERNELS["sdpa"])
    strategy = strategy_of(layout, family, mesh, attention)
    condition = Condition(torch.randn(1, TEXT, 24), torch.randn(1, 12))
    guidance = Guidance(strategy.predict, DiscreteFlow(1.0, 1.0), mesh.cfg, condition, condition, 2.0)
    # The first step of all also gathers the first block for itself.
    guidance.denoised(torch.randn(BATCH, 16, ROWS, ROWS), torch.tensor(0.7))
    mesh.ledger.reset()
    strategy.begin_step(layout.warmup_steps)
    guidance.denoised(torch.randn(BATCH, 16, ROWS, ROWS), torch.tensor(0.5))
    strategy.finish()
    return {axis: mesh.ledger.bytes_on(axis) for axis in AXES}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """A model's theory, its file, and the bytes of its blocks."""
    theory = MODELS[request.param]
    path = tmp_path_factory.mktemp("model")
    transformer = theory.build()
    transformer.save_pretrained(path)
    return theory, path, sum(value.nbytes for name, value in transformer.state_dict().items() if "blocks." in name)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(ulysses_degree=2),
        Layout(ulysses_degree=4),
        Layout(ring_degree=2),
        Layout(ring_degree=4),
        Layout(ulysses_degree=2, ring_degree=2),
        Layout(ulysses_degree=2, ring_degree=2, cfg_degree=2),
        Layout(distrifusion_degree=2),
        Layout(distrifusion_degree=2, ulysses_degree=2, ring_degree=2),
        Layout(distrifusion_degree=2, refresh="in_turn"),
        Layout(tensor_degree=2),
        Layout(tensor_degree=4, cfg_degree=2),
        Layout(tensor_degree=2, ulysses_degree=2, ring_degree=2),
        Layout(ulysses_degree=2, weights="sharded"),
        Layout(tensor_degree=2, ring_degree=2, cfg_degree=2, weights="sharded"),
    ],
    ids=str,
)
def test_bytes_sent_match_theory(ranks, model, layout):
    theory, path, block_bytes = model
    ulysses, ring, tensor, replicas = layout.ulysses_degree, layout.ring_degree, layout.tensor_degree, layout.replicas
    cfg, late = layout.cfg_degree, layout.distrifusion_degree
    evaluations = 2 // cfg
    token_bytes = BATCH * HEADS * HEAD_DIM * BYTES * evaluations
    sequence = ulysses * ring * late
    turns = late * (late if layout.refresh == "in_turn" else 1)
    expected = {
        # USP (arXiv 2405.07719): four all-to-alls of this rank's tokens; keys and values of R - 1 other ranks' hops.
        "ulysses": 4 * (ulysses - 1) / ulysses**2 * theory.attended / ring / late * token_bytes / tensor,
        "ring": 2 * (ring - 1) * theory.attended / ring / ulysses * token_bytes / tensor,
        # DistriFusion (arXiv 2402.19481): this rank's keys and values to every other; in turn, every N-th time.
        "distrifusion": 2 * (late - 1) / turns * theory.attended / ring / ulysses * token_bytes / tensor,
        # Megatron-LM (arXiv 1909.08053): all-reduces of this rank's tokens. The modulation of a block is gathered.
        "tensor": (tensor - 1) / tensor * token_bytes * (2 * theory.reduced / sequence + theory.gathered),
        # FSDP: every evaluation gathers every block once.
        "replicas": (replicas - 1) / replicas * block_bytes / tensor * evaluations * (layout.weights == "sharded"),
        # The predicted latent is put together once an evaluation, and handed over once a step.
        "sequence": (sequence - 1) / sequence * LATENT_BYTES * evaluations,
        "cfg": (cfg - 1) * LATENT_BYTES,
    }
    for sent in ranks.run(layout.ranks, traffic_of_one_step, layout, path):
        assert sent == pytest.approx(expected, rel=0.05)
