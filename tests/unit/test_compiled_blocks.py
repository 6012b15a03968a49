"""Compiled blocks predict what plain ones do, and few are compiled, however many there are."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from paralleldit.parallel_backend.attention.kernels import KERNELS
from paralleldit.parallel_backend.attention.usp import AttentionCore
from paralleldit.parallel_backend.distributed.axis import Axis
from paralleldit.parallel_backend.distributed.ledger import Ledger
from paralleldit.parallel_backend.families.blocks import compiled
from paralleldit.parallel_backend.strategies.sequence import SequenceParallel
from paralleldit.tests.covering import WHOLE
from paralleldit.tests.tiny_models import CPU, TINY_MODELS
from torch._dynamo.utils import counters


# Flux: a double block, the first single block, and the others, whose text and image lie in one tensor. Z-Image: so too,
# with a refiner for the double block. SD3.5: blocks with a second attention, without, and the last one. HunyuanDiT:
# blocks that take a skip, and the others. With the "eager" backend they are traced, and computed as they were: to make
# code of what was traced takes ten times as long. Code of PixArt's blocks is run in tests/ranks/test_compiled.py, that
# of Flux' in `make matrix`.
@pytest.mark.parametrize(
    ("model", "kinds", "backend"),
    [
        ("flux dev", 3, "inductor" if WHOLE else "eager"),
        ("pixart alpha", 1, "eager"),
        ("sd3.5 medium", 3, "eager"),
        ("hunyuandit 1.1", 2, "eager"),
        ("wan 2.1", 1, "eager"),
        ("z-image", 3, "eager"),
        ("qwen-image", 1, "eager"),
    ],
)
def test_compiled_blocks_predict_the_same(monkeypatch, model, kinds, backend):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    tiny = TINY_MODELS[model]
    family = tiny.family(tiny.make(2, depth=3), torch.float32, CPU)
    ulysses, ring, sequence = (Axis(name, [0], None, Ledger()) for name in ("ulysses", "ring", "sequence"))
    strategy = SequenceParallel(family, sequence, AttentionCore(ulysses, ring, KERNELS["sdpa"]))
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    condition, latent = tiny.condition(draw, 1, 5), tiny.latent(draw, 1, 8, 6)
    timestep = torch.tensor([0.7])
    with torch.inference_mode():
        plain = strategy.predict(latent, timestep, condition)
        family.blocks = compiled(family.blocks)
        torch._dynamo.reset()
        counters.clear()
        answers = [strategy.predict(latent, timestep, each) for each in (condition, replace(condition))]
    for each in answers:
        torch.testing.assert_close(each, plain, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == kinds
    assert not counters["graph_break"]


def test_dynamo_does_not_lose_patience(monkeypatch):
    """By itself it would go on without a word, and without compiling, after 8 graphs of all kinds and sizes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    (block,) = compiled([lambda state: state + 1])
    torch._dynamo.reset()
    counters.clear()
    for dims in range(1, 11):
        block(torch.zeros((2,) * dims))
    assert counters["stats"]["unique_graphs"] == 10
