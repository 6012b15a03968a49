"""The families whose text stays as it is compute its keys and values once for each condition, and keep them as long."""

import gc
from dataclasses import replace

import pytest
import torch
from paralleldit.parallel_backend.attention.kernels import KERNELS
from paralleldit.parallel_backend.attention.usp import AttentionCore
from paralleldit.parallel_backend.distributed.axis import Axis
from paralleldit.parallel_backend.distributed.ledger import Ledger
from paralleldit.parallel_backend.strategies.sequence import SequenceParallel
from paralleldit.tests.tiny_models import TINY_MODELS


@pytest.mark.parametrize("model", ["pixart alpha", "hunyuandit 1.1", "wan 2.1"])
@torch.inference_mode()
def test_text_is_computed_once_for_each_condition(model):
    tiny = TINY_MODELS[model]
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    family = tiny.make_family(2)
    calls = []
    for layer in family.layers:
        layer.attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    one, two, three = (Axis(name, [0], None, Ledger()) for name in ("ulysses", "ring", "sequence"))
    predict = SequenceParallel(family, three, AttentionCore(one, two, KERNELS["sdpa"])).predict
    conditions = [replace(tiny.condition(draw, batch, 5), size=(64, 64)) for batch in (1, 2)]
    latent, timestep = tiny.latent(draw, 2, 8, 8), torch.full((2,), 500.0)
    first = [predict(latent, timestep, condition) for condition in conditions]
    assert len(calls) == 2 * len(family.layers)
    again = [predict(latent, timestep, condition.part(slice(0, 2), 2)) for condition in conditions]
    assert len(calls) == 2 * len(family.layers)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(*first)
    kept = family.blocks[0].text._kept
    assert len(kept) == len(conditions)
    conditions.clear()
    gc.collect()
    assert len(kept) == 0
