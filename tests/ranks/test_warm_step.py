"""What a step of ComfyUI's own samplers costs the ranks beside its evaluations."""

from __future__ import annotations

import pytest
import torch
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol.messages import (
    Adapters,
    EndRun,
    LoraRef,
    ModelRef,
    Predict,
    Result,
    RunPrompt,
)
from paralleldit.tests.ranks.stale_flux import HEADS, WIDTH
from paralleldit.tests.ranks.worker_loop import counted, loop_of
from paralleldit.tests.tiny_models import TINY_MODELS
from safetensors.torch import save_file

POSITIVE, NEGATIVE = "a" * 32, "b" * 32


def told(*keys: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        f"{key}.0.{name}": torch.randn(1, *shape, generator=draw)
        for key in keys
        for name, shape in (("tokens", (5, 24)), ("pooled", (12,)))
    }


def step_of(folder, layout, keys, run="c" * 32):
    """A step of a run whose conditions are known already."""
    request = Predict(
        id=1,
        model=ModelRef(path=str(folder / "model")),
        layout=layout,
        run=run,
        conditions=keys,
        adapters=Adapters(files=(LoraRef(path=str(folder / "lora.safetensors")),)),
    )
    rows = len(keys)
    return request, {"latent": torch.full((rows, 16, 8, 8), 0.5), "timestep": torch.full((rows,), 0.7)}


def first_of(step):
    """The same step, with all of its conditions told."""
    request, tensors = step
    prompts = {key: RunPrompt(guidance=3.5) for key in request.conditions}
    return request.model_copy(update={"run_conditions": prompts}), tensors | told(*request.conditions)


def costs(world, folder, asked):
    """By request: round trips of the control groups and looks at files; and the kinds of the answers."""
    loop = loop_of(world.rank, asked)
    found = []
    for _ in asked:
        with counted(loop, folder) as counts:
            loop._serve_one()
        found.append((counts["round trips"], counts["files"]))
    return found, [type(reply) for reply, _ in loop.server.answers] if loop.server else []


@pytest.fixture
def folder(tmp_path):
    TINY_MODELS["flux dev"].make(HEADS).save_pretrained(tmp_path / "model")
    layer = "transformer.transformer_blocks.0.attn.to_q"
    lora = {f"{layer}.lora_A.weight": torch.ones(2, WIDTH), f"{layer}.lora_B.weight": torch.ones(WIDTH, 2) / 100}
    save_file(lora, tmp_path / "lora.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        (Layout(cfg_degree=2), (POSITIVE, NEGATIVE)),
        (Layout(ulysses_degree=2), (POSITIVE,)),
        (Layout(ulysses_degree=2), (POSITIVE, NEGATIVE)),
    ],
    ids=["cfg", "one prompt", "two prompts in turn"],
)
def test_a_warm_step_meets_three_times_at_most_and_looks_at_no_file(ranks, folder, layout, keys):
    step = step_of(folder, layout, keys)
    asked = [first_of(step), step, step, (EndRun(id=1, run="c" * 32), {}), first_of(step)]
    (found, kinds), *others = ranks.run(2, costs, folder, asked)
    assert set(kinds) == {Result}
    print(f"{layout}, {len(keys)} conditions: round trips and looks at files of each request: {found}")
    assert [other for other, _ in others] == [found]
    for round_trips, files in found[1:3]:
        assert round_trips <= 3
        assert files == 0
    assert found[0][1] > 0 < found[4][1], "a run looks again"
